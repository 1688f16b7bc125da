"""Adapter folders: reading, refusals, and loading written folders with plain PEFT."""

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp_lora.adapters.folder import (
    adapter_in,
    adapter_modules,
    attach_adapter,
    check_fits,
    read_adapter,
    write_adapter,
)
from grasp_lora.core.lora import LoraFactors, merge
from grasp_lora.models.modules import base_fingerprint
from helpers import (
    ARCHITECTURES,
    logits_of,
    mixture_adapter_folder,
    random_ids,
    tiny_adapter_folder,
    tiny_mixture_model,
    tiny_model,
    tiny_peft_model,
    tiny_vision_model,
)

Deltas = Mapping[str, Tensor]


def with_deltas(model: PreTrainedModel, deltas: Deltas) -> PreTrainedModel:
    """Return the reference: a float64 model with weights W + delta ([out, in]), without PEFT."""
    changed = copy.deepcopy(model).double()
    for name, module in changed.named_modules():
        if name in deltas:
            delta = deltas[name].T if isinstance(module, Conv1D) else deltas[name]
            module.weight.data += delta
    return changed


def delta(A: Tensor, B: Tensor, scaling: float = 1.0) -> Tensor:
    return scaling * (B.double() @ A.double())


def assert_same_logits(first: torch.nn.Module, second: torch.nn.Module, atol: float = 1e-6) -> None:
    """Compare in float64, so that only the rounding of the factors remains."""
    ids = random_ids()
    expected = logits_of(copy.deepcopy(second).double(), ids)
    actual = logits_of(copy.deepcopy(first).double(), ids)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def pairs_of(adapter: Mapping[str, LoraFactors]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A and B times the scaling."""
    return {name: (f.A, f.scaling * f.B) for name, f in adapter.items()}


def write(folder: Path, modules: Mapping[str, tuple[Tensor, Tensor]], model: Any) -> Path:
    return write_adapter(
        folder,
        modules,
        model=model,
        base_name="someone/tiny",
        fingerprint=base_fingerprint(model),
        extra={"ratio": 0.4},
    )


def edit_config(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file({key: t.clone() for key, t in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_factors_read_give_the_logits_peft_gives(tmp_path: Path, arch: str) -> None:
    model = tiny_model(arch)
    folder = tiny_adapter_folder(tmp_path / "a", model, r=3, alpha=7)
    adapter = read_adapter(folder).adapter
    with_peft = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    ours = with_deltas(model, {name: delta(f.A, f.B, f.scaling) for name, f in adapter.items()})
    ids = random_ids()
    assert (logits_of(with_peft, ids) - logits_of(model, ids)).abs().max() > 1e-2
    assert_same_logits(ours, with_peft)


def test_scaling_follows_both_patterns_and_rslora(tmp_path: Path) -> None:
    model = tiny_model()
    folder = tiny_adapter_folder(
        tmp_path / "a",
        model,
        r=4,
        alpha=8,
        use_rslora=True,
        rank_pattern={"layers.1.self_attn.q_proj": 9},
        alpha_pattern={"v_proj": 5, r"layers\.1.*q_proj": 3},
    )
    adapter = read_adapter(folder).adapter
    attention = "model.layers.{}.self_attn.{}_proj"
    expected = {
        attention.format(0, "q"): 8 / 4**0.5,
        attention.format(1, "q"): 3 / 9**0.5,
        attention.format(0, "v"): 5 / 4**0.5,
        attention.format(1, "v"): 5 / 4**0.5,
    }
    assert {name: f.scaling for name, f in adapter.items()} == pytest.approx(expected)
    with_peft = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    peft_scaling = {n: m.scaling["default"] for n, m in adapter_modules(with_peft).items()}
    assert peft_scaling == pytest.approx(expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["cat", "linear", "svd"])
def test_written_merge_loads_in_plain_peft_with_same_logits(
    tmp_path: Path, arch: str, kind: str
) -> None:
    model = tiny_model(arch)
    adapters = [
        read_adapter(tiny_adapter_folder(tmp_path / str(seed), model, seed=seed)).adapter
        for seed in (1, 2)
    ]
    merged = merge(kind, adapters, [0.5, 0.5], rank=3 if kind == "svd" else None)  # type: ignore[arg-type]
    modules = {name: (m.A, m.B) for name, m in merged.items()}
    folder = write(tmp_path / "merged", modules, model)
    with_peft = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    ours = with_deltas(model, {name: delta(A, B) for name, (A, B) in modules.items()})
    assert_same_logits(with_peft, ours)


def test_cat_of_different_ranks_and_targets_keeps_the_sum_of_deltas(tmp_path: Path) -> None:
    model = tiny_model()
    first = read_adapter(tiny_adapter_folder(tmp_path / "1", model, r=4, use_rslora=True)).adapter
    second = read_adapter(
        tiny_adapter_folder(
            tmp_path / "2",
            model,
            r=3,
            targets=("q_proj", "up_proj"),
            rank_pattern={"layers.0.mlp.up_proj": 7},
            alpha_pattern={"layers.0.mlp.up_proj": 9},
        )
    ).adapter
    merged = merge("cat", [first, second], [0.5, -0.25])
    folder = write(tmp_path / "m", {n: (m.A, m.B) for n, m in merged.items()}, model)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(first.keys() | second.keys())
    # One rank, and an alpha that equals it: a scaling of 1 for every reader.
    assert config["alpha_pattern"] == config["rank_pattern"] == {}
    assert config["lora_alpha"] == config["r"] == 7
    deltas = {name: delta(f.A, f.B, 0.5 * f.scaling) for name, f in first.items()}
    for name, f in second.items():
        deltas[name] = deltas.get(name, 0) - delta(f.A, f.B, 0.25 * f.scaling)
    with_peft = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    assert_same_logits(with_peft, with_deltas(model, deltas))


def test_merging_one_adapter_gives_that_adapter(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    source = tiny_adapter_folder(
        tmp_path / "a",
        model,
        use_rslora=True,
        rank_pattern={"layers.0.self_attn.q_proj": 7},
        alpha_pattern={"layers.1.self_attn.v_proj": 9},
    )
    merged = merge("cat", [read_adapter(source).adapter], [1.0])
    folder = write(tmp_path / "m", {n: (m.A, m.B) for n, m in merged.items()}, model)
    assert_same_logits(
        PeftModel.from_pretrained(copy.deepcopy(model), folder),
        PeftModel.from_pretrained(copy.deepcopy(model), source),
        atol=5e-6,  # the square roots of the scaling are rounded to float32
    )


def test_folders_have_one_rank_and_what_is_added_is_zero(tmp_path: Path) -> None:
    """A reader that knows the global alpha and each tensor's rank alone gets the same deltas."""
    model, generator = tiny_model(), torch.Generator().manual_seed(0)
    ranks = {"q_proj": 2, "k_proj": 5, "v_proj": 3}
    modules = {
        f"model.layers.1.self_attn.{name}": (
            torch.randn(rank, 16, generator=generator),
            torch.randn(16 if name == "q_proj" else 8, rank, generator=generator),
        )
        for name, rank in ranks.items()
    }
    folder = write(tmp_path / "a", modules, model)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, (A, B) in modules.items():
        seen_a = tensors[f"base_model.model.{name}.lora_A.weight"]
        seen_b = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert seen_a.shape[0] == seen_b.shape[1] == 5
        as_llama_cpp = delta(seen_a, seen_b, config["lora_alpha"] / seen_b.shape[1])
        assert torch.equal(seen_a[: len(A)], A)
        assert torch.equal(seen_b[:, : len(A)], B)
        torch.testing.assert_close(as_llama_cpp, delta(A, B), rtol=1e-14, atol=1e-14)
    plain = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    assert_same_logits(plain, with_deltas(model, {n: delta(*pair) for n, pair in modules.items()}))
    own = {name: f.A.shape[0] for name, f in read_adapter(folder).adapter.items()}
    assert own == {name: A.shape[0] for name, (A, _) in modules.items()}
    assert read_adapter(folder).extra == {"ratio": 0.4}


def test_a_component_that_was_trained_since_is_read(tmp_path: Path) -> None:
    model = tiny_model()
    q, v = (f"model.layers.0.self_attn.{name}" for name in ("q_proj", "v_proj"))
    modules = {
        q: (torch.ones(3, 16), torch.ones(16, 3)),
        v: (torch.ones(1, 16), torch.ones(8, 1)),
    }
    folder = write(tmp_path / "a", modules, model)
    assert read_adapter(folder).adapter[v].A.shape == (1, 16)

    def grow(tensors: dict[str, Tensor]) -> None:
        tensors[f"base_model.model.{v}.lora_A.weight"][2] = 1

    assert read_adapter(edit_tensors(folder, grow)).adapter[v].A.shape == (3, 16)


def test_a_written_folder_reads_back_exactly(tmp_path: Path) -> None:
    model = tiny_model()
    adapter = read_adapter(tiny_adapter_folder(tmp_path / "a", model)).adapter
    folder = write_adapter(
        tmp_path / "w",
        {name: (f.A, f.B) for name, f in adapter.items()},
        model=model,
        base_name="someone/tiny",
        fingerprint="f" * 64,
        extra={"ratio": 0.4},
        scaling=0.3,
    )
    loaded = read_adapter(folder)
    assert loaded.base_name == "someone/tiny"
    assert (loaded.fingerprint, loaded.vocab_size) == ("f" * 64, 272)
    assert loaded.extra == {"ratio": 0.4}
    assert loaded.adapter.keys() == adapter.keys()
    for name, factors in loaded.adapter.items():
        assert torch.equal(factors.A, adapter[name].A)
        assert torch.equal(factors.B, adapter[name].B)
        assert factors.scaling == pytest.approx(0.3)


def test_equal_adapters_are_written_byte_for_byte_alike(tmp_path: Path) -> None:
    model = tiny_model()
    modules = pairs_of(read_adapter(tiny_adapter_folder(tmp_path / "a", model)).adapter)
    first = write(tmp_path / "1", modules, model)
    second = write(tmp_path / "2", dict(reversed(modules.items())), model)
    for name in sorted(os.listdir(first)):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_writing_over_an_adapter_replaces_it_and_leaves_nothing_else(tmp_path: Path) -> None:
    model = tiny_model()
    modules = pairs_of(read_adapter(tiny_adapter_folder(tmp_path / "a", model)).adapter)
    folder = write(tmp_path / "out" / "w", modules, model)
    smaller = dict(list(modules.items())[:1])
    write(folder, smaller, model)
    assert read_adapter(folder).adapter.keys() == smaller.keys()
    assert os.listdir(tmp_path / "out") == ["w"]
    assert len(os.listdir(folder)) == 3


def test_nothing_is_written_when_a_tensor_holds_nan(tmp_path: Path) -> None:
    model = tiny_model()
    modules = pairs_of(read_adapter(tiny_adapter_folder(tmp_path / "a", model)).adapter)
    name, (A, B) = next(iter(modules.items()))
    modules[name] = (A.clone().fill_(float("nan")), B)
    with pytest.raises(ValueError, match=r"lora_A of .*q_proj.* NaN"):
        write(tmp_path / "w", modules, model)
    assert os.listdir(tmp_path) == ["a"]


def test_a_folder_is_not_created_when_saving_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    modules = pairs_of(read_adapter(tiny_adapter_folder(tmp_path / "a", model)).adapter)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(LoraConfig, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "w", modules, model)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attached_adapter_computes_and_trains_as_the_factors_say(arch: str) -> None:
    model = tiny_model(arch)
    names = adapter_modules(tiny_peft_model(model))
    generator = torch.Generator().manual_seed(3)
    modules = {}
    for rank, (name, layer) in enumerate(names.items(), start=1):
        shapes = (rank, layer.in_features), (layer.out_features, rank)
        modules[name] = tuple(torch.randn(s, generator=generator) * 0.2 for s in shapes)
    reference = with_deltas(model, {n: delta(A, B) for n, (A, B) in modules.items()})
    global_state = torch.get_rng_state()
    peft_model = attach_adapter(copy.deepcopy(model), modules)
    assert torch.equal(torch.get_rng_state(), global_state)
    assert_same_logits(peft_model.eval(), reference)
    trainable = [n for n, p in peft_model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * len(modules)
    assert all(".lora_" in n for n in trainable)


def test_attached_factors_stay_float32_on_a_bfloat16_base() -> None:
    model = tiny_model().to(torch.bfloat16)
    name = "model.layers.0.self_attn.q_proj"
    A, B = torch.randn(2, 16) / 3, torch.randn(16, 2) / 3
    layer = adapter_modules(attach_adapter(model, {name: (A, B)}))[name]
    assert torch.equal(layer.lora_A["default"].weight, A)
    assert torch.equal(layer.lora_B["default"].weight, B)
    assert layer.get_base_layer().weight.dtype == torch.bfloat16


def test_an_adapter_is_checked_and_written_while_its_base_carries_lora(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    modules = pairs_of(read_adapter(tiny_adapter_folder(tmp_path / "a", model)).adapter)
    bare = write(tmp_path / "bare", modules, model)
    peft_model = attach_adapter(model, modules)
    for number, wrapped in enumerate((model, peft_model)):
        check_fits(read_adapter(bare), wrapped, "source")
        again = write(tmp_path / str(number), modules, wrapped)
        for name in os.listdir(bare):
            assert (again / name).read_bytes() == (bare / name).read_bytes()


def test_an_adapter_is_not_attached_twice() -> None:
    model = tiny_model()
    modules = {"model.layers.0.self_attn.q_proj": (torch.ones(2, 16), torch.ones(16, 2))}
    with pytest.raises(ValueError, match="already has LoRA layers"):
        attach_adapter(attach_adapter(model, modules).get_base_model(), modules)


def test_a_factor_is_refused_with_a_name_when_it_holds_nan_or_infinity(tmp_path: Path) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model())
    key = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[key][2, 1] = float("inf")

    with pytest.raises(ValueError, match=f"{key}.*NaN or infinite"):
        read_adapter(edit_tensors(folder, spoil))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "use_dora=True means DoRA"),
        pytest.param(
            {"lora_bias": True},
            "lora_bias=True means a bias",
            marks=pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning"),
        ),
        ({"bias": "lora_only"}, "bias='lora_only' means trained bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*in full"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices=.*token embeddings"),
    ],
)
def test_adapters_made_by_peft_with_more_than_lora_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model(), **settings)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)
    # Also when the config denies it: the tensors tell. A whole output layer is compared later.
    if settings.keys().isdisjoint({"bias", "modules_to_save"}):
        edit_config(folder, **dict.fromkeys(settings))
        with pytest.raises(ValueError, match=r"tensor '.*(magnitude|bias|token_adapter)"):
            read_adapter(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"target_parameters": ["experts.w"]}, "target_parameters=.*bare parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
        ({"alora_invocation_tokens": [5]}, "activated LoRA"),
        ({"lora_alpha": "8"}, "lora_alpha is '8', but must be a finite number"),
    ],
)
def test_configs_beyond_plain_lora_are_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model())
    with pytest.raises(ValueError, match=message):
        read_adapter(edit_config(folder, **changes))


@pytest.mark.filterwarnings("ignore")  # PEFT warns of tied layers; here they are the point.
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_lora_on_embeddings_and_output_layer_is_refused(
    tmp_path: Path, target: str, tie: bool
) -> None:
    model = tiny_model(tie=tie)
    config = LoraConfig(target_modules=["q_proj", target], task_type="CAUSAL_LM")
    get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path / "a")
    with pytest.raises(ValueError, match="embedding|output layer"):
        read_adapter(tmp_path / "a")


def _drop(part: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[next(key for key in tensors if part in key)]

    return change


def _set(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({key: value})


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, r"gives 'model\.layers\.0.*' the rank 8, but its tensors have rank 4"),
        ({"rank_pattern": {r"layers\.1.*v_proj": 2}}, r"'model\.layers\.1.*v_proj' the rank 2"),
    ],
)
def test_a_config_of_another_rank_is_refused_as_peft_refuses_it(
    tmp_path: Path, change: dict, message: str
) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model())
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(tiny_model(), folder)
    with pytest.raises(ValueError, match=message):
        read_adapter(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("q_proj.lora_A"), r"lora_A of 'model\.layers\.0.*q_proj' is missing"),
        (_drop("v_proj.lora_B"), r"lora_B of 'model\.layers\.0.*v_proj' is missing"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(3, 16)), r"ranks of .*\[3, 16\].*\[16, 4\]"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(0, 16)), "non-empty"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(4)), r"\[4\], but a LoRA factor"),
        (_set(f"{Q0}.lora_A.weight", torch.ones(4, 16, dtype=torch.int8)), "torch.int8"),
        (_set(f"{Q0}.lora_C.weight", torch.ones(4, 16)), "lora_C.weight' has an unknown name"),
        (_set("base_model.model.lm_head.lora_A.weight", torch.ones(4, 16)), "the output layer"),
        (_set(f"{Q0}.base_layer.weight", torch.ones(1)), "a base weight saved"),
        (dict.clear, "holds no tensors"),
    ],
)
def test_tensors_that_do_not_make_an_adapter_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model())
    with pytest.raises(ValueError, match=message):
        read_adapter(edit_tensors(folder, change))


def test_missing_and_damaged_files_are_each_named(tmp_path: Path) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model())
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        read_adapter(tmp_path / "nowhere")
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"safetensors is damaged or cut short"):
        read_adapter(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"pickle.*safe_serialization=True"):
        read_adapter(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_model\.safetensors"):
        read_adapter(folder)
    config.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_adapter(folder)
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config\.json"):
        read_adapter(folder)


def test_an_adapter_fits_its_own_model_and_a_deeper_one(tmp_path: Path) -> None:
    loaded = read_adapter(tiny_adapter_folder(tmp_path / "a", tiny_model()))
    check_fits(loaded, tiny_model(), "source")
    check_fits(loaded, tiny_model(layers=3), "source")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 1}, r"^source has layer 1 \(.*\), but this model has 1 layers"),
        ({"width": 32}, r"^source: .*q_proj' maps 32 inputs to 32 outputs"),
        ({"arch": "gpt2"}, r"^source names the module 'model\.layers\.0\.self_attn\.q_proj'"),
    ],
)
def test_an_adapter_of_another_shape_of_model_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    loaded = read_adapter(tiny_adapter_folder(tmp_path / "a", tiny_model()))
    with pytest.raises(ValueError, match=message):
        check_fits(loaded, tiny_model(**settings), "source")


def test_a_recorded_base_is_recognised_in_any_precision_and_no_other_passes(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    modules = pairs_of(read_adapter(tiny_adapter_folder(tmp_path / "a", model)).adapter)
    loaded = read_adapter(write(tmp_path / "w", modules, model))
    check_fits(loaded, tiny_model().to(torch.bfloat16), "source")
    with pytest.raises(ValueError, match="other base weights"):
        check_fits(loaded, tiny_model(seed=1), "source")
    with pytest.raises(ValueError, match="vocabulary of 272 tokens, but this model has 280"):
        check_fits(loaded, tiny_model(vocab=280), "source")


OLDER_NAMES = {"model.model.language_model.": "model.language_model.model."}


def rename_tensors(folder: Path, names: Mapping[str, str]) -> Path:
    """Give the tensors of an adapter the names of an earlier version."""

    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            renamed = key
            for new, old in names.items():
                renamed = renamed.replace(new, old)
            tensors[renamed] = tensors.pop(key)

    before = set(load_file(folder / "adapter_model.safetensors"))
    edit_tensors(folder, change)
    assert before.isdisjoint(load_file(folder / "adapter_model.safetensors"))
    return folder


def test_names_of_an_older_transformers_are_read_as_peft_reads_them(tmp_path: Path) -> None:
    model = tiny_vision_model()
    folder = tiny_adapter_folder(
        tmp_path / "a",
        model,
        targets=r".*language_model.*(q_proj|v_proj)",
        alpha_pattern={"language_model.layers.1.self_attn.q_proj": 3},
    )
    rename_tensors(folder, OLDER_NAMES)
    loaded = read_adapter(folder, model)
    check_fits(loaded, model, "source")
    deltas = {name: delta(f.A, f.B, f.scaling) for name, f in loaded.adapter.items()}
    with_peft = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    assert (logits_of(with_peft, random_ids()) - logits_of(model, random_ids())).abs().max() > 0.01
    assert_same_logits(with_deltas(model, deltas), with_peft)


def test_names_that_the_model_itself_changes_are_read_as_peft_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    folder = tiny_adapter_folder(tmp_path / "a", model)
    rename_tensors(folder, {"model.model.layers": "model.trunk.blocks"})
    rules = {r"^trunk\.blocks": "model.layers", "layers": "never"}
    monkeypatch.setattr(type(model), "_checkpoint_conversion_mapping", rules, raising=False)
    loaded = read_adapter(folder, model)
    deltas = {name: delta(f.A, f.B, f.scaling) for name, f in loaded.adapter.items()}
    with_peft = PeftModel.from_pretrained(copy.deepcopy(model), folder)
    assert (logits_of(with_peft, random_ids()) - logits_of(model, random_ids())).abs().max() > 0.01
    assert_same_logits(with_deltas(model, deltas), with_peft)


def test_lora_on_experts_of_an_older_transformers_is_refused(tmp_path: Path) -> None:
    model, folder = tiny_mixture_model(), mixture_adapter_folder(tmp_path / "a")
    with pytest.raises(ValueError, match="is LoRA on the experts of a mixture; only A and B of"):
        read_adapter(folder, model)


def test_an_adapter_with_a_name_of_its_own_is_found_where_it_is_the_only_one(
    tmp_path: Path,
) -> None:
    model = tiny_model()
    trained = get_peft_model(copy.deepcopy(model), LoraConfig(r=2), adapter_name="arabic")
    trained.save_pretrained(tmp_path / "one")
    assert adapter_in(tmp_path / "one") == tmp_path / "one" / "arabic"
    inside = read_adapter(tmp_path / "one" / "arabic").adapter
    found = read_adapter(tmp_path / "one").adapter
    assert found.keys() == inside.keys()
    assert all(torch.equal(found[name].A, inside[name].A) for name in found)
    trained.add_adapter("swahili", LoraConfig(r=2))
    trained.save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match=r"2 adapters in subfolders \(arabic, swahili\); give one"):
        read_adapter(tmp_path / "two")
    trained.add_adapter("default", LoraConfig(r=3))
    trained.save_pretrained(tmp_path / "three")
    ranks = {f.rank for f in read_adapter(tmp_path / "three").adapter.values()}
    assert ranks == {3}, "the folder's own adapter goes first, as with PEFT"


def shard(folder: Path) -> Path:
    """Divide the weights among several files, as the hub's library does."""
    whole = folder / "adapter_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    save_torch_state_dict(
        tensors, folder, filename_pattern="adapter_model{suffix}.safetensors", max_shard_size=700
    )
    assert len(list(folder.glob("adapter_model-*.safetensors"))) > 2
    return folder


def test_an_adapter_in_several_files_is_read_like_one_in_a_single_file(tmp_path: Path) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model())
    whole = read_adapter(folder).adapter
    parts = read_adapter(shard(folder)).adapter
    assert parts.keys() == whole.keys()
    for name, factors in whole.items():
        assert torch.equal(parts[name].A, factors.A)
        assert torch.equal(parts[name].B, factors.B)
    last = sorted(folder.glob("adapter_model-*.safetensors"))[-1]
    last.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {last.name}, which .*index.json names"):
        read_adapter(folder)


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": []}, {"weight_map": {"a": "../b"}}, {"weight_map": {"a": 1}}]
)
def test_an_index_that_names_no_files_is_refused(tmp_path: Path, index: dict) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model())
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match="must name a file|lacks 1"):
        read_adapter(folder)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_embeddings_saved_along_are_accepted_if_they_are_the_models(
    tmp_path: Path, arch: str
) -> None:
    model = tiny_model(arch)
    adapter = tiny_peft_model(model)
    adapter.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    loaded = read_adapter(tmp_path / "a", model)
    assert len(loaded.embeddings) == 2
    check_fits(loaded, model, "source")
    check_fits(loaded, copy.deepcopy(model).to(torch.bfloat16), "source")
    deltas = {name: delta(f.A, f.B, f.scaling) for name, f in loaded.adapter.items()}
    with_peft = PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "a")
    assert_same_logits(with_deltas(model, deltas), with_peft)


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_other_embeddings_are_refused_with_what_to_do(tmp_path: Path) -> None:
    model = tiny_model()
    tiny_peft_model(model).save_pretrained(tmp_path / "a", save_embedding_layers=True)
    loaded = read_adapter(tmp_path / "a")
    way_out = r"save_pretrained\(\.\.\., save_embedding_layers=False\)"
    changed = copy.deepcopy(model)
    changed.get_output_embeddings().weight.data[5] += 1.0
    with pytest.raises(ValueError, match=rf"^source .*'lm_head.weight'.*other values.*{way_out}"):
        check_fits(loaded, changed, "source")
    changed.resize_token_embeddings(280)
    with pytest.raises(ValueError, match=rf"\[272, 16\], which .* has as \[280, 16\].*{way_out}"):
        check_fits(loaded, changed, "source")
    with pytest.raises(ValueError, match=rf"which this model does not have.*{way_out}"):
        check_fits(replace(loaded, embeddings={"old.wte.weight": torch.ones(1)}), model, "source")


def test_settings_of_a_newer_peft_are_refused_where_they_are_in_use(tmp_path: Path) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model())
    plain = read_adapter(folder).adapter
    edit_config(folder, use_novel=False, novel_config=None, novel_pattern={}, novel_names=[])
    assert read_adapter(folder).adapter.keys() == plain.keys()
    message = r"does not know the setting novel_scale=0\.5 in adapter_config.*upgrade PEFT"
    with pytest.raises(ValueError, match=message):
        read_adapter(edit_config(folder, novel_scale=0.5))
    edit_config(folder, novel_scale=0, novel_config={"text": "x" * 200})
    with pytest.raises(ValueError, match=r"novel_config=\{'text': 'x{60,68}\.\.\. in"):
        read_adapter(folder)
