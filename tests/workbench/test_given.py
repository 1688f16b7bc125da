"""Given adapters that name another base model than the backbone: told before any work."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from grasp_lora.cli import app
from grasp_lora.config.run_config import load_config
from grasp_lora.core.lora import LoraFactors
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.given import check_given, check_merge
from helpers import (
    logits_of,
    random_ids,
    tiny_adapter_folder,
    tiny_backbone_folder,
    tiny_model,
    tiny_peft_model,
)
from jobs import job, write_job


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return (configuration file, source, target); both name other bases, not the same one."""
    folder = tmp_path_factory.mktemp("given")
    tiny_backbone_folder(folder / "base")
    adapters = {}
    for seed, role in enumerate(("source", "target")):
        adapters[role] = tiny_adapter_folder(folder / role, tiny_model(), seed=seed)
        path = adapters[role] / "adapter_config.json"
        named = {"base_model_name_or_path": f"someone/{role}-base"}
        path.write_text(json.dumps(json.loads(path.read_text()) | named))
    paths = {role: str(path) for role, path in adapters.items()}
    file = write_job(folder / "run.yaml", job(folder, adapters=paths))
    return str(file), adapters["source"], adapters["target"]


def check_told(output):
    said = " ".join(output.split())
    assert "source names someone/source-base as its base model; it is put on" in said
    assert "target names someone/target-base as its base model; it is put on" in said
    assert "different base models (someone/source-base, someone/target-base)" in said


def test_another_base_is_told_before_a_run(place, capsys):
    file, *adapters = place
    check_given(open_context(load_config(file)), adapters)
    check_told(capsys.readouterr().err)


def test_another_base_is_told_by_merge_and_precheck(place, tmp_path):
    file, *_ = place
    for command in (["merge", file, "--out", str(tmp_path / "merged")], ["precheck", file]):
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        check_told(done.output)


CHATML = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_adapters_merge_alike_however_their_folders_are_laid_out(place, tmp_path):
    file, source, target = place
    laid_out = tmp_path / "source" / "english", tmp_path / "target"
    shutil.copytree(source, laid_out[0])
    whole = laid_out[0] / "adapter_model.safetensors"
    tensors = load_file(whole)
    whole.unlink()
    pattern = "adapter_model{suffix}.safetensors"
    save_torch_state_dict(tensors, laid_out[0], filename_pattern=pattern, max_shard_size=700)
    tiny_peft_model(tiny_model(), seed=1).save_pretrained(laid_out[1], save_embedding_layers=True)
    (laid_out[1] / "chat_template.jinja").write_text(CHATML)
    folders = {"plain": (source, target), "laid-out": (tmp_path / "source", laid_out[1])}
    for name, (first, second) in folders.items():
        command = ["merge", file, "--out", str(tmp_path / name), "--set=data.chat=true"]
        done = CliRunner().invoke(app, [*command, f"--adapter={first}", f"--adapter={second}"])
        assert done.exit_code == 0, done.output
        said = " ".join(done.output.split())
        assert (f"{tmp_path / 'source'} holds one adapter, in the subfolder english" in said) == (
            name == "laid-out"
        )
    plain, other = (
        PeftModel.from_pretrained(tiny_model(), tmp_path / name).eval() for name in folders
    )
    expected = logits_of(plain, random_ids())
    assert (expected - logits_of(tiny_model(), random_ids())).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(other, random_ids()), expected, rtol=0, atol=0)
    # The merged adapter is asked in the template that the target was trained with.
    assert (tmp_path / "laid-out/chat_template.jinja").read_text() == CHATML
    assert not (tmp_path / "plain/chat_template.jinja").exists()


Q, V = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"
EXPERTS = ("model.layers.0.mlp.experts.0.up_proj", "model.layers.0.mlp.experts.1.up_proj")


@pytest.mark.parametrize(
    ("scope", "unit", "modules", "fault"),
    [
        ("policy", "source", (Q,), None),
        ("policy", "merged", (Q, V), None),
        ("policy", "merged", (Q,), "scope: 'policy' needs at least two groups"),
        ("policy", "merged", EXPERTS, "scope: 'policy' needs modules of several layers, types or"),
        ("layer", "merged", (Q, V), "scope: 'layer' needs at least two groups"),
        ("global", "merged", (Q,), None),
    ],
)
def test_a_scope_that_tells_no_modules_apart_is_refused(place, scope, unit, modules, fault):
    context = open_context(load_config(place[0], [f"scope={scope}", f"mask_unit={unit}"]))
    one = LoraFactors(torch.zeros(2, 4), torch.zeros(4, 2), 1.0)
    given = {role: dict.fromkeys(modules, one) for role in ("source", "target")}
    if fault is None:
        check_merge(context, given)
        return
    with pytest.raises(ValueError, match=re.escape(fault)):
        check_merge(context, given)
