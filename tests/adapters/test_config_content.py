"""Settings of the wrong type, expressions that never end, and numbers beyond float32."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grasp_lora.adapters import config_content
from grasp_lora.adapters.folder import read_adapter
from grasp_lora.adapters.opening import check_openable, model_with_adapter
from grasp_lora.models.backbones import Backbone, ModelSpec, load_backbone
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Backbone:
    folder = tiny_backbone_folder(tmp_path_factory.mktemp("base"))
    return load_backbone(ModelSpec(str(folder), device="cpu"))


def edited(folder: Path, **changes: object) -> Path:
    made = tiny_adapter_folder(folder / "adapter", tiny_model())
    stored = json.loads((made / CONFIG).read_text())
    (made / CONFIG).write_text(json.dumps(stored | changes))
    return made


def with_tensor(folder: Path, change) -> Path:
    made = tiny_adapter_folder(folder / "adapter", tiny_model())
    tensors = load_file(made / WEIGHTS)
    name = next(iter(tensors))
    tensors[name] = change(tensors[name])
    save_file(tensors, made / WEIGHTS)
    return made


def refused(folder: Path, said: str) -> None:
    """Check that both ways to open an adapter refuse it, each in one line that names it."""
    for opened in (read_adapter, check_openable):
        with pytest.raises(ValueError, match=said) as caught:
            opened(folder)
        assert folder.name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lora_alpha": NAN}, "lora_alpha is nan, but must be a finite number"),
        ({"lora_alpha": INF}, "lora_alpha is inf"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"r": "4"}, "r is '4', but must be a whole number above 0"),
        ({"r": 0}, "r is 0"),
        ({"use_rslora": "false"}, "use_rslora is 'false', but must be true or false"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*whole number above 0 each"),
        ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": NAN}}, "alpha_pattern is .*finite number each"),
        ({"alpha_pattern": "q_proj"}, "alpha_pattern is 'q_proj'"),
        ({"target_modules": 5}, "target_modules is 5, but must be a list of names or a regular"),
        ({"target_modules": {"q_proj": 1}}, "target_modules is"),
        ({"target_modules": [1, 2]}, "target_modules is"),
        ({"exclude_modules": [[]]}, "exclude_modules is"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head', but must be a list"),
        ({"layers_to_transform": "1"}, "layers_to_transform is '1'"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is"),
        ({"peft_type": ["LORA"]}, "peft_type is"),
    ],
)
def test_a_setting_of_another_type_is_refused(tmp_path, changes, said):
    refused(edited(tmp_path, **changes), said)


@pytest.mark.parametrize("alpha", [1e308, -1e308])
def test_an_alpha_that_float32_cannot_hold_is_refused(tmp_path, alpha):
    folder = edited(tmp_path, lora_alpha=alpha)
    with pytest.raises(ValueError, match=r"of .*'.* with a scaling of .*e\+307 .*cannot hold"):
        read_adapter(folder)


def test_factors_that_float32_cannot_hold_are_refused(tmp_path):
    refused(with_tensor(tmp_path, lambda t: t.double() * 1e300), r"up to .*e\+29.*float32 cannot")
    large = with_tensor(tmp_path, lambda t: torch.full_like(t, 1e38))
    with pytest.raises(ValueError, match="add values that float32 cannot hold"):
        read_adapter(large)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_factors_that_are_not_finite_are_refused_in_every_format(tmp_path, value):
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.float8_e5m2):
        bad = with_tensor(tmp_path, lambda t, d=dtype: torch.full(t.shape, value).to(d))
        refused(bad, "holds NaN or infinite values, so the training diverged")


def test_numbers_of_a_small_format_are_read(tmp_path):
    folder = with_tensor(tmp_path, lambda t: t.to(torch.float8_e4m3fn))
    first = next(iter(read_adapter(folder).adapter.values()))
    assert first.A.dtype == torch.float32


def test_a_number_format_that_is_not_known_is_refused(tmp_path):
    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model())
    content = (folder / WEIGHTS).read_bytes()
    for name in (b"F99", b"F4 ", b"I99", b"XYZ"):
        (folder / WEIGHTS).write_bytes(content.replace(b"F32", name))
        refused(folder, "damaged or cut short, or has an unknown number format")


@pytest.mark.parametrize("name", [CONFIG, "grasp_lora.json"])
def test_json_nested_too_deeply_is_refused(tmp_path, name):
    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model())
    (folder / name).write_text('{"a":' * 200_000 + "1" + "}" * 200_000)
    with pytest.raises(ValueError, match=f"{name} is nested too deeply"):
        read_adapter(folder)


@pytest.mark.parametrize(("name", "value"), [("base_fingerprint", 5), ("vocab_size", "a")])
def test_notes_of_another_type_are_refused(tmp_path, name, value):
    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model())
    (folder / "grasp_lora.json").write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=f"{name} is .*does not write; restore the file"):
        read_adapter(folder)


@pytest.mark.parametrize("setting", ["rank_pattern", "alpha_pattern", "target_modules"])
def test_an_expression_that_never_ends_is_refused_in_time(tmp_path, monkeypatch, backbone, setting):
    monkeypatch.setattr(config_content, "MATCHING_SECONDS", 0.5)
    # Names of modules are full of letters, dots and digits, which this tries in every grouping.
    slow = r"([\w.]|[\w.]?)+!"
    folder = edited(tmp_path, **{setting: slow if setting == "target_modules" else {slow: 4}})
    began = time.perf_counter()
    said = f"{setting} .* takes more than 0.5 s to match the names of the modules; write the names"
    with pytest.raises(ValueError, match=said):
        read_adapter(folder)
    with (
        pytest.raises(ValueError, match=said),
        model_with_adapter(backbone, folder),
    ):
        pass
    assert time.perf_counter() - began < 15


@pytest.mark.parametrize("pattern", ["(", "a{99999999999999999999}", "[", "(?P<x>a)(?P<x>b)"])
def test_what_is_no_regular_expression_is_refused(tmp_path, pattern):
    folder = edited(tmp_path, target_modules=pattern)
    with pytest.raises(ValueError, match="target_modules .* is no regular expression"):
        read_adapter(folder)


def test_a_regular_expression_for_modules_is_read(tmp_path):
    folder = edited(tmp_path, target_modules=r".*\.(q_proj|v_proj)", rank_pattern={"q_.*": 4})
    assert read_adapter(folder).adapter.keys()


def test_a_rank_far_beyond_the_tensors_is_refused(tmp_path, backbone):
    folder = edited(tmp_path, r=10**9)
    with (
        pytest.raises(ValueError, match="r is 1000000000, but no tensor of the adapter has a side"),
        model_with_adapter(backbone, folder),
    ):
        pass


def test_a_chat_template_that_is_no_text_is_refused(tmp_path):
    from grasp_lora.adapters.chat import saved_template

    folder = tiny_adapter_folder(tmp_path / "adapter", tiny_model())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": [5, "a"]}))
    assert saved_template(folder) is None
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(ValueError, match="chat_template is 5, which is no text"):
        saved_template(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not UTF-8"):
        saved_template(folder)
