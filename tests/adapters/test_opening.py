"""Adapters of every type are loaded as PEFT saved them, scored in batches, and removed."""

import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from grasp_lora.adapters import opening
from grasp_lora.adapters.folder import read_adapter, write_adapter
from grasp_lora.adapters.opening import (
    is_adapter,
    lines_about,
    lines_about_all,
    model_with_adapter,
    named_base_model,
    open_model,
)
from grasp_lora.base.files import write_json
from grasp_lora.generation.generate import GenerationSettings, generate_texts
from grasp_lora.models.backbones import Backbone, ModelSpec, load_backbone
from grasp_lora.models.example_losses import EncodedExamples, example_losses
from grasp_lora.models.modules import base_fingerprint, forward_accepts
from grasp_lora.models.sources import GgufSource
from grasp_lora.tasks.encoding import Collator, EncodedExample
from helpers import (
    EOS_ID,
    PAD_ID,
    logits_of,
    mixture_adapter_folder,
    random_ids,
    tiny_adapter_folder,
    tiny_bloom_model,
    tiny_mixture_model,
    tiny_model,
    tiny_tokenizer,
    tiny_vision_model,
)

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12], [40, 41, 42], [100, 3], [7, 6, 5, 4]]
ANSWERS = [[1, 2, 3], [9], [8, 8], [4, 5, 6, 7]]
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def config(
    kind: str, targets: Sequence[str] | None = ("q_proj", "v_proj"), **settings: Any
) -> PeftConfig:
    if targets and "target_modules" in getattr(peft, kind).__dataclass_fields__:
        settings = {"target_modules": list(targets)} | settings
    return getattr(peft, kind)(**{"task_type": "CAUSAL_LM"} | settings)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: config("LoraConfig", r=4),
    "lora without a task type": lambda: config("LoraConfig", r=4, task_type=None),
    "lora of two ranks": lambda: config("LoraConfig", r=4, rank_pattern={"v_proj": 2}),
    "dora": lambda: config("LoraConfig", r=4, use_dora=True),
    "lora and biases": lambda: config("LoraConfig", r=4, bias="all"),
    "lora and a whole layer": lambda: config("LoraConfig", r=4, modules_to_save=["lm_head"]),
    "lora and embeddings": lambda: config("LoraConfig", r=4),
    "lora and tokens": lambda: config("LoraConfig", r=4, trainable_token_indices=[5, 6]),
    "adalora": lambda: config("AdaLoraConfig", total_step=9),
    "ia3": lambda: config("IA3Config", feedforward_modules=[]),
    "loha": lambda: config("LoHaConfig", r=4),
    "vera": lambda: config("VeraConfig", ["q_proj"], r=4),
    "llama adapter": lambda: config("AdaptionPromptConfig", None, adapter_len=3, adapter_layers=1),
    "prompt tuning": lambda: config("PromptTuningConfig", num_virtual_tokens=5),
    "p-tuning": lambda: config("PromptEncoderConfig", num_virtual_tokens=5, encoder_hidden_size=8),
    "prefix tuning": lambda: config("PrefixTuningConfig", num_virtual_tokens=5),
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "llama"
    model = tiny_model("llama")
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def backbone(base_folder: Path) -> Backbone:
    """Return one backbone for all tests; each test must remove its adapters."""
    return load_backbone(ModelSpec(str(base_folder), dtype="float32", device="cpu"))


def trained(model: Any, chosen: PeftConfig) -> PeftModel:
    """Return a PEFT model whose adapter weights all differ from their initial values."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        adapter = get_peft_model(model, chosen)
        for weight in adapter.parameters():
            if weight.requires_grad:
                weight.data += 0.3 * torch.randn(weight.shape)
    return adapter.eval()


def saved(adapter: PeftModel, folder: Path, **settings: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapter.save_pretrained(str(folder), **settings)
    return folder


class Numbers:
    """Decodes tokens to their ids, because different invalid bytes give the same text."""

    def batch_decode(self, ids: Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join(str(i) for i in row if i not in (PAD_ID, EOS_ID)) for row in ids.tolist()]


def texts(model: nn.Module, batch_size: int) -> list[str]:
    settings = GenerationSettings(6, batch_size, PAD_ID, [EOS_ID])
    return generate_texts(model, Numbers(), PROMPTS, settings)


def losses(model: nn.Module, batch_size: int) -> Tensor:
    rows = [
        EncodedExample(str(i), "", (*prompt, *answer), len(prompt), 0)
        for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True))
    ]
    collator = Collator(
        PAD_ID, forward_accepts(model, "position_ids"), forward_accepts(model, "logits_to_keep")
    )
    batches = EncodedExamples(rows, collator, batch_size).batches(range(len(rows)))
    return torch.tensor(example_losses(model, batches, len(rows)))


@torch.no_grad()
def by_peft(model: nn.Module) -> tuple[Tensor, list[str]]:
    """Return the reference: PEFT's forward on one example, without padding, cache and positions."""

    def logits(ids: Sequence[int]) -> Tensor:
        with warnings.catch_warnings():
            # PEFT passes a prefix under a name that transformers has deprecated.
            warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
            return model(input_ids=torch.tensor([ids])).logits[0, -len(ids) :]

    values: list[Tensor] = []
    lines: list[str] = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        predicted = logits([*prompt, *answer])[len(prompt) - 1 : -1]
        values.append(F.cross_entropy(predicted, torch.tensor(answer)))
        ids = list(prompt)
        while len(ids) < len(prompt) + 6 and ids[-1] != EOS_ID:
            ids.append(int(logits(ids)[-1].argmax()))
        lines.append(" ".join(str(i) for i in ids[len(prompt) :] if i != EOS_ID))
    return torch.stack(values), lines


def assert_equals_peft(model: nn.Module, reference: nn.Module) -> None:
    values, lines = by_peft(reference)
    for batch_size in (1, 4):
        torch.testing.assert_close(losses(model, batch_size), values, rtol=0, atol=1e-5)
        assert texts(model, batch_size) == lines


@pytest.mark.parametrize("name", CONFIGS)
def test_any_adapter_scores_as_with_peft_and_leaves_the_backbone_bare(
    name: str, backbone: Backbone, tmp_path: Path
) -> None:
    reference = trained(tiny_model("llama"), CONFIGS[name]())
    if name == "lora and embeddings":
        with torch.no_grad():
            reference.get_input_embeddings().weight.mul_(1.5)
        folder = saved(reference, tmp_path / "adapter", save_embedding_layers=True)
    else:
        folder = saved(reference, tmp_path / "adapter")
    before = {key: value.clone() for key, value in backbone.model.state_dict().items()}
    attributes = set(vars(backbone.model))
    bare = losses(backbone.model, 4)
    state = torch.get_rng_state()
    with model_with_adapter(backbone, folder) as model:
        assert not model.training
        assert (losses(model, 4) - bare).abs().max() > 1e-3
        assert_equals_peft(model, reference)
    assert torch.equal(torch.get_rng_state(), state)
    assert losses(backbone.model, 4).equal(bare)
    after = backbone.model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].equal(value) for key, value in before.items())
    assert set(vars(backbone.model)) == attributes
    assert not any(weight.requires_grad for weight in backbone.model.parameters())


@pytest.mark.parametrize("arch", ["gpt2", "gemma3_text", "bloom"])
@pytest.mark.parametrize("name", ["prompt tuning", "prefix tuning"])
def test_virtual_tokens_do_not_depend_on_the_padding(
    name: str, arch: str, backbone: Backbone, tmp_path: Path
) -> None:
    make = tiny_bloom_model if arch == "bloom" else lambda: tiny_model(arch)
    reference = trained(make(), CONFIGS[name]())
    folder = saved(reference, tmp_path / "adapter")
    other = replace(backbone, model=make().requires_grad_(False), fingerprint=None)
    with model_with_adapter(other, folder) as model:
        assert_equals_peft(model, reference)


def test_virtual_tokens_get_no_logits(backbone: Backbone, tmp_path: Path) -> None:
    reference = trained(tiny_model("llama"), CONFIGS["prompt tuning"]())
    ids = random_ids(2, 7)
    with model_with_adapter(backbone, saved(reference, tmp_path / "adapter")) as model:
        found = model(input_ids=ids).logits
        last = model(input_ids=ids, logits_to_keep=3).logits
    expected = reference(input_ids=ids).logits[:, 5:]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(last, expected[:, -3:], rtol=0, atol=1e-5)


def test_right_padding_is_refused_for_virtual_tokens(backbone: Backbone, tmp_path: Path) -> None:
    folder = saved(trained(tiny_model("llama"), CONFIGS["prompt tuning"]()), tmp_path / "adapter")
    mask = torch.tensor([[1, 1, 0]])
    with (
        model_with_adapter(backbone, folder) as model,
        pytest.raises(ValueError, match="on the left"),
    ):
        model(input_ids=torch.tensor([[1, 2, 3]]), attention_mask=mask)


def test_adapters_can_follow_each_other_on_one_backbone(backbone: Backbone, tmp_path: Path) -> None:
    references = {n: trained(tiny_model("llama"), CONFIGS[n]()) for n in ("lora", "ia3")}
    for name, reference in references.items():
        with model_with_adapter(backbone, saved(reference, tmp_path / name)) as model:
            assert_equals_peft(model, reference)


def test_an_error_inside_leaves_the_backbone_bare(backbone: Backbone, tmp_path: Path) -> None:
    bare = losses(backbone.model, 4)
    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model("llama"))
    with pytest.raises(KeyError), model_with_adapter(backbone, folder):
        raise KeyError("inside")
    assert losses(backbone.model, 4).equal(bare)


def test_an_adapter_opens_on_the_base_that_it_names(base_folder: Path, tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = tiny_adapter_folder(tmp_path / "adapter", model)
    name_base(folder, str(base_folder))
    notices: list[str] = []
    with open_model(folder, notice=notices.append) as (backbone, adapter):
        assert backbone.public_name == str(base_folder)
        found = adapter(input_ids=random_ids()).logits.float()
    assert notices == []
    reference = PeftModel.from_pretrained(model, str(folder))
    expected = reference(input_ids=random_ids()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0.5)  # bfloat16 on some machines


def test_another_base_than_the_named_one_is_told(base_folder: Path, tmp_path: Path) -> None:
    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model("llama"))
    name_base(folder, "someone/tiny")
    notices: list[str] = []
    with open_model(str(folder), ModelSpec(str(base_folder)), notices.append):
        pass
    assert notices == [f"{folder} names someone/tiny as its base model; it is put on {base_folder}"]


def name_base(folder: Path, name: str | None, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text()) | {"base_model_name_or_path": name} | changes
    path.write_text(json.dumps(content))


def test_adapters_of_different_bases_are_told(backbone: Backbone, tmp_path: Path) -> None:
    def naming(base: str | None) -> Path:
        folder = tmp_path / str(base).replace("/", "-")
        if not folder.exists():
            tiny_adapter_folder(folder, tiny_model("llama"))
            name_base(folder, base)
        return folder

    def told(*bases: str | None) -> list[str]:
        return lines_about_all(list(map(naming, bases)), "asked", backbone)

    assert told("asked", None) == []
    # Two names for the model that is loaded are one base.
    assert told("asked", backbone.public_name) == []
    lines = told("some/one", "some/one")
    assert all("some-one names some/one as its base model; it is put on" in line for line in lines)
    assert len(lines) == 2
    first, second, between = told("some/one", "an/other")
    assert "some/one as" in first
    assert "an/other as" in second
    assert "different base models (some/one, an/other)" in between
    assert "different base models (asked, an/other)" in told(backbone.public_name, "an/other")[-1]


def test_one_base_below_the_home_folder_is_one_however_it_is_written(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model("llama"))
    for named, asked in ((str(tmp_path / "base"), "~/base"), ("~/base", str(tmp_path / "base"))):
        name_base(folder, named)
        assert lines_about_all([folder], asked, backbone) == []
        assert lines_about_all([folder], "~/other", backbone) != []


def test_a_model_without_an_adapter_opens_bare(base_folder: Path) -> None:
    with open_model(base_folder) as (backbone, model):
        assert model is backbone.model
    spec = ModelSpec(str(base_folder), dtype="float32")
    with open_model(str(base_folder), spec) as (backbone, _):
        assert backbone.dtype == torch.float32


def test_a_base_model_for_a_model_is_refused(base_folder: Path) -> None:
    with (
        pytest.raises(ValueError, match="is a model, not an adapter"),
        open_model(base_folder, ModelSpec("smollm2")),
    ):
        pass


def test_what_is_neither_adapter_nor_model_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither adapter_config\.json .* nor config\.js"):
        is_adapter(tmp_path)
    for missing in (tmp_path / "none", "./none", "runs/one/adapter", "~/none"):
        with pytest.raises(FileNotFoundError, match="there is no .*none|there is no runs"):
            is_adapter(missing)
    assert not is_adapter("smollm2")
    assert not is_adapter("someone/model")


def test_an_adapter_without_a_base_is_refused(tmp_path: Path) -> None:
    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model("llama"))
    name_base(folder, None)
    with pytest.raises(ValueError, match="does not say which base model"), open_model(folder):
        pass


def test_a_public_name_means_the_packaged_weights_for_our_own_adapters_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> GgufSource:
        raise ValueError("not installed")

    tiny = GgufSource("tiny", "0", "someone/tiny", lambda folder: folder)
    monkeypatch.setattr(opening, "SHORT_NAMES", {"absent": absent, "tiny": lambda: tiny})
    model = tiny_model("llama")
    foreign = tiny_adapter_folder(tmp_path / "foreign", model)
    name_base(foreign, "someone/tiny")
    assert named_base_model(foreign) == "someone/tiny"
    assert named_base_model(ours(tmp_path / "ours", model)) == "tiny"
    assert named_base_model(ours(tmp_path / "other", model, "someone/else")) == "someone/else"
    assert named_base_model("someone/tiny") == "someone/tiny"


def test_a_result_of_a_stage_is_put_on_the_model_that_the_stage_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = ours(tmp_path / "ours", tiny_model("llama"), None)
    (folder / "stage.json").write_text(json.dumps({"base_model": "~/base"}))
    with pytest.raises(ValueError, match="does not say which base model"):
        named_base_model(folder)
    (tmp_path / "base").mkdir()
    assert named_base_model(folder) == str(tmp_path / "base")


def test_a_gguf_file_of_a_hub_is_no_path(tmp_path: Path) -> None:
    folder = ours(tmp_path / "ours", tiny_model("llama"), "owner/model/q4/small.gguf")
    assert named_base_model(folder) == "owner/model/q4/small.gguf"


def ours(folder: Path, model: Any, base_name: str | None = "someone/tiny") -> Path:
    module = "model.layers.0.self_attn.q_proj"
    return write_adapter(
        folder,
        {module: (torch.ones(2, 16), torch.ones(16, 2))},
        model=model,
        base_name=base_name,
        fingerprint=base_fingerprint(model),
    )


def test_other_base_weights_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    with model_with_adapter(backbone, ours(tmp_path / "right", tiny_model("llama"))):
        pass
    folder = ours(tmp_path / "wrong", tiny_model("llama", seed=1))
    with (
        pytest.raises(ValueError, match="trained on other base weights"),
        model_with_adapter(backbone, folder),
    ):
        pass
    folder = ours(tmp_path / "wide", tiny_model("llama", vocab=300))
    with (
        pytest.raises(ValueError, match="a vocabulary of 300 tokens"),
        model_with_adapter(backbone, folder),
    ):
        pass


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(KEY), "q_proj.lora_A.weight' has no tensor in adapter_model"),
    "unexpected": (
        lambda t: t.update({KEY.replace("layers.0", "layers.7"): torch.ones(4, 16)}),
        r"layers\.7.* has no place in this model",
    ),
    "several": (
        lambda t: t.update({f"one.{i}": torch.ones(1) for i in range(3)}),
        "'one.0' and 2 more have no place",
    ),
    "shape": (lambda t: t.update({KEY: torch.ones(4, 18)}), "has another shape.*q_proj"),
    "nan": (lambda t: t[KEY].fill_(torch.nan), "q_proj.*NaN or infinite"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_tensors_that_do_not_fit_are_refused(name: str, backbone: Backbone, tmp_path: Path) -> None:
    change, message = DAMAGES[name]
    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model("llama"))
    change_tensors(folder, change)
    bare = losses(backbone.model, 4)
    with pytest.raises(ValueError, match=message), model_with_adapter(backbone, folder):
        pass
    assert losses(backbone.model, 4).equal(bare)


def test_an_adapter_of_another_architecture_is_refused(backbone: Backbone, tmp_path: Path) -> None:
    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model("gpt2"))
    with (
        pytest.raises(ValueError, match="does not fit this model"),
        model_with_adapter(backbone, folder),
    ):
        pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "NOVEL"}, "knows no peft_type 'NOVEL'"),
        ({"peft_type": None}, "knows no peft_type None"),
        ({"peft_type": "XLORA"}, "XLORA adapter cannot be evaluated here: it mixes other"),
        ({"task_type": "SEQ_CLS"}, "made for the task type 'SEQ_CLS'"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base weights"),
        ({"use_dora": True, "megatron_config": 1}, "is no valid LORA config|has no tensor"),
    ],
)
def test_configs_that_cannot_be_used_are_refused(
    changes: dict[str, Any], message: str, backbone: Backbone, tmp_path: Path
) -> None:
    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model("llama"))
    name_base(folder, "someone/tiny", **changes)
    with pytest.raises(ValueError, match=message), model_with_adapter(backbone, folder):
        pass


def test_pickled_weights_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model("llama"))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with (
        pytest.raises(ValueError, match="only adapter_model.bin, a pickle"),
        model_with_adapter(backbone, folder),
    ):
        pass


def assert_loads_like_peft(make: Callable[[], Any], folder: Path, backbone: Backbone) -> None:
    """Compare with `PeftModel.from_pretrained`; the adapter must change the logits."""
    ids = random_ids()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits_of(PeftModel.from_pretrained(make(), str(folder)).eval(), ids)
    assert (expected - logits_of(make(), ids)).abs().max() > 1e-2
    other = replace(backbone, model=make().requires_grad_(False), fingerprint=None)
    with model_with_adapter(other, folder) as model:
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits_of(other.model, ids), logits_of(make(), ids))


# PEFT warns of a pattern that it has written itself.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_names_of_an_older_transformers_load_as_with_peft(
    backbone: Backbone, tmp_path: Path
) -> None:
    folder = tiny_adapter_folder(
        tmp_path / "vision", tiny_vision_model(), targets=r".*language_model.*(q_proj|v_proj)"
    )
    older = "model.language_model.model.", "model.model.language_model."

    def change(tensors: dict[str, Tensor]) -> None:
        for key in list(tensors):
            tensors[key.replace(*older[::-1])] = tensors.pop(key)

    change_tensors(folder, change)
    assert_loads_like_peft(tiny_vision_model, folder, backbone)
    experts = mixture_adapter_folder(tmp_path / "experts")
    assert_loads_like_peft(tiny_mixture_model, experts, backbone)


# PEFT warns of a pattern that it has written itself.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_older_names_that_peft_cannot_place_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model("llama"))
    path = "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight"
    change_tensors(folder, lambda tensors: tensors.update({path: tensors.pop(KEY)}))
    with (
        pytest.raises(ValueError, match=r"decoder.* has no place in this model"),
        model_with_adapter(backbone, folder),
    ):
        pass
    half = mixture_adapter_folder(tmp_path / "half")
    change_tensors(half, lambda tensors: [tensors.pop(k) for k in list(tensors) if ".w3." in k])
    mixture = replace(backbone, model=tiny_mixture_model().requires_grad_(False), fingerprint=None)
    message = "PEFT cannot bring the tensors into the form"
    with pytest.raises(ValueError, match=message), model_with_adapter(mixture, half):
        pass


def test_weights_in_several_files_load_like_one_file(backbone: Backbone, tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = tiny_adapter_folder(tmp_path / "a", model)
    expected = logits_of(PeftModel.from_pretrained(tiny_model("llama"), str(folder)), random_ids())
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    pattern = "adapter_model{suffix}.safetensors"
    save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=700)
    with model_with_adapter(backbone, folder) as adapted:
        torch.testing.assert_close(logits_of(adapted, random_ids()), expected, rtol=0, atol=1e-5)


def test_embeddings_saved_along_unchanged_load_like_none(
    backbone: Backbone, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    saved(trained(tiny_model("llama"), CONFIGS["lora"]()), folder, save_embedding_layers=True)
    assert_loads_like_peft(lambda: tiny_model("llama"), folder, backbone)


def test_embeddings_of_another_size_are_refused_with_what_to_do(
    backbone: Backbone, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    model.resize_token_embeddings(280, mean_resizing=False)
    folder = tmp_path / "a"
    saved(trained(model, CONFIGS["lora"]()), folder, save_embedding_layers=True)
    message = (
        r"'base_model\.model\..*weight' is saved along as \[280, 16\], but this model has "
        r"\[272, 16\].*resize_token_embeddings.*save_embedding_layers=False"
    )
    with pytest.raises(ValueError, match=message), model_with_adapter(backbone, folder):
        pass


def test_an_adapter_of_an_unknown_type_is_refused_when_it_is_opened(
    base_folder: Path, tmp_path: Path
) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model("llama"))
    name_base(folder, str(base_folder), peft_type="NOVEL")
    with pytest.raises(ValueError, match="knows no peft_type 'NOVEL'"), open_model(folder):
        pass


def test_an_adapter_in_a_subfolder_is_opened_and_told(
    base_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    inside = tiny_adapter_folder(tmp_path / "out" / "arabic", tiny_model("llama"))
    name_base(inside, str(base_folder))
    folder = tmp_path / "out"
    assert is_adapter(folder)
    assert named_base_model(folder) == str(base_folder)
    with model_with_adapter(backbone, inside) as model:
        expected = logits_of(model, random_ids())
    notices: list[str] = []
    spec = ModelSpec(str(base_folder), dtype="float32", device="cpu")
    with open_model(folder, spec, notices.append) as (_, model):
        torch.testing.assert_close(logits_of(model, random_ids()), expected)
    assert notices == [f"{folder} holds one adapter, in the subfolder arabic; it is used"]
    tiny_adapter_folder(folder / "swahili", tiny_model("llama"))
    with pytest.raises(ValueError, match=r"\(arabic, swahili\); give one of them"):
        is_adapter(folder)
    # A model may have adapters below it.
    (folder / "config.json").write_text("{}")
    assert not is_adapter(folder)


def test_settings_of_a_newer_peft_are_told_or_refused(
    base_folder: Path, backbone: Backbone, tmp_path: Path
) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model("llama"))
    changes = {"use_novel": False, "novel_config": None, "peft_version": "9.1.0"}
    name_base(folder, str(base_folder), **changes, runtime_config={"ephemeral_gpu_offload": True})
    line = (
        f"{folder} was written by a newer PEFT (9.1.0): the installed one does not know "
        "novel_config, use_novel, which the adapter does not use"
    )
    assert lines_about(folder, str(base_folder), backbone) == [line]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        with model_with_adapter(backbone, folder):
            pass
    assert_loads_like_peft(lambda: tiny_model("llama"), folder, backbone)
    name_base(folder, str(base_folder), novel_scale=2.0)
    with (
        pytest.raises(ValueError, match=r"does not know the setting novel_scale=2\.0"),
        model_with_adapter(backbone, folder),
    ):
        pass


@pytest.mark.parametrize("base", ["/home/someone/models/x", "../models/x", "C:\\models\\x"])
def test_a_base_at_a_path_that_is_not_here_is_refused_before_any_model_is_looked_for(
    base: str, tmp_path: Path
) -> None:
    folder = tiny_adapter_folder(tmp_path / "a", tiny_model("llama"))
    name_base(folder, base)
    told = (
        f"the adapter {folder} names {base!r} as its base model, a path that is not on this "
        "machine; pass --model with the folder or the hub id of that model"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(told)}$"):
        named_base_model(folder)


@pytest.mark.parametrize("opened", [is_adapter, named_base_model, read_adapter])
def test_a_result_that_is_a_prompt_is_refused_as_such(tmp_path, opened):
    write_json(tmp_path / "prompt.json", {"prompt": "Q: 1 + 1? A: 2\n\n"})
    with pytest.raises(ValueError, match=r"holds no adapter: its run found none better .*prompt"):
        opened(tmp_path)
