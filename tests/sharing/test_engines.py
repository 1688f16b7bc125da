"""What engines make of foreign adapters: refusals, and scales that come out wrong."""

import json

import pytest

from grasp_lora.adapters.folder import read_adapter, write_adapter
from grasp_lora.core.lora import merge
from grasp_lora.sharing.engines import ENGINES, faults_for
from helpers import tiny_adapter_folder, tiny_model

PEFT_ENGINES = [name for name in ENGINES if name != "mlx"]


def edited(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.mark.parametrize("engine", PEFT_ENGINES)
def test_one_rank_and_one_alpha_are_read_right_by_all(engine, model, tmp_path):
    assert faults_for(engine, tiny_adapter_folder(tmp_path / "a", model, r=4, alpha=8)) == []


@pytest.mark.parametrize("engine", PEFT_ENGINES)
def test_mixed_ranks_are_a_fault_and_what_this_library_writes_is_none(engine, model, tmp_path):
    """Rank 2 of one module with its own alpha 4 is a scale of 2, as everywhere: 8 / 4."""
    mixed = tiny_adapter_folder(
        tmp_path / "a", model, r=4, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 4}
    )
    faults = faults_for(engine, mixed)
    # vLLM pads and uses one scale: it reads lower ranks right as long as r is the largest.
    assert bool(faults) == (engine != "vllm")
    merged = merge("cat", [read_adapter(mixed).adapter], [1.0])
    pairs = {name: (one.A, one.B) for name, one in merged.items()}
    ours = write_adapter(tmp_path / "b", pairs, model=model, base_name=None, fingerprint=None)
    assert faults_for(engine, ours) == []


def test_llama_cpp_divides_the_global_alpha_by_the_rank_of_each_tensor(model, tmp_path):
    folder = tiny_adapter_folder(
        tmp_path / "a", model, r=4, rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 4}
    )
    (line,) = faults_for("llama.cpp", folder)
    assert line.startswith("the global lora_alpha alone is read: 2 of 4 modules")
    assert "v_proj by 4 in place of 2" in line


def test_vllm_needs_r_to_be_the_largest_rank(model, tmp_path):
    folder = tiny_adapter_folder(tmp_path / "a", model, r=2, rank_pattern={"v_proj": 4})
    assert any("rank 4, above r=2" in line for line in faults_for("vllm", folder))


def test_rank_stabilised_scales_are_known_to_vllm_alone(model, tmp_path):
    folder = tiny_adapter_folder(tmp_path / "a", model, r=4, alpha=8, use_rslora=True)
    assert faults_for("vllm", folder) == []
    assert "by 2 in place of 4" in faults_for("sglang", folder)[0]
    assert "by 2 in place of 4" in faults_for("llama.cpp", folder)[0]


@pytest.mark.parametrize("engine", PEFT_ENGINES)
@pytest.mark.parametrize(
    ("setting", "value"),
    [("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("lora_bias", True)],
)
def test_what_no_engine_reads_is_told(engine, setting, value, model, tmp_path):
    folder = edited(tiny_adapter_folder(tmp_path / "a", model), **{setting: value})
    assert any(line.startswith(f"{setting}=") for line in faults_for(engine, folder))


def test_other_kinds_of_adapters_and_engines_are_told(model, tmp_path):
    folder = tiny_adapter_folder(tmp_path / "a", model)
    assert "no PEFT folder" in faults_for("mlx", folder)[0]
    with pytest.raises(ValueError, match="no engine 'ollama' is known; give one of: llama.cpp"):
        faults_for("ollama", folder)
    assert faults_for("vllm", edited(folder, peft_type="IA3")) == [
        "peft_type is 'IA3'; it reads LORA alone"
    ]


def test_a_damaged_file_is_one_error(model, tmp_path):
    folder = tiny_adapter_folder(tmp_path / "a", model)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(ValueError, match="adapter_model.safetensors' is damaged or cut short"):
        faults_for("vllm", folder)
