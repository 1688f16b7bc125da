"""The command merge with adapter folders alone, from its arguments to the folder that it writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from typer.testing import CliRunner

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.cli import app
from grasp_lora.cli.common import one_by_one
from helpers import (
    logits_of,
    random_ids,
    tiny_adapter_folder,
    tiny_backbone_folder,
    tiny_model,
)

RANKS = {"a": 4, "b": 2, "c": 3}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, adapters a, b and c of different ranks, and one without a name."""
    folder = tmp_path_factory.mktemp("merge")
    tiny_backbone_folder(folder / "base")
    for seed, (name, rank) in enumerate({**RANKS, "nameless": 4, "stranger": 4}.items()):
        tiny_adapter_folder(folder / name, tiny_model(), r=rank, seed=seed)
        base = {"nameless": None, "stranger": "owner/other"}.get(name, str(folder / "base"))
        file = folder / name / "adapter_config.json"
        content = json.loads(file.read_text()) | {"base_model_name_or_path": base}
        file.write_text(json.dumps(content))
    (folder / "no_adapter").mkdir()
    return folder


def merge(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


@pytest.mark.parametrize(
    ("names", "given", "weights"),
    [
        ("ab", ("--weights", "0.25", "0.75"), (0.25, 0.75)),
        ("ab", ("--weights", "-1", "2e-1"), (-1, 0.2)),
        ("abc", ("--weights", ".5", ".25", ".25"), (0.5, 0.25, 0.25)),
        # AdaMergeX: a task in one language, and a reference task in another language less in the
        # first.
        ("abc", ("--weights", "1", "1", "-1"), (1, 1, -1)),
        ("abc", (), (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_folders_are_merged_without_a_configuration(place, tmp_path, names, given, weights):
    done = merge(*(place / name for name in names), *given, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["r"] == written["lora_alpha"] == sum(RANKS[name] for name in names)
    assert not written.get("rank_pattern")
    assert not written.get("alpha_pattern")
    found = PeftModel.from_pretrained(tiny_model(), tmp_path / "out").eval()
    # Independent of our merge: the changes of weights that PEFT computes from each adapter.
    theirs = PeftModel.from_pretrained(tiny_model(), place / names[0], adapter_name=names[0])
    for name in names[1:]:
        theirs.load_adapter(place / name, adapter_name=name)
    expected: Any = tiny_model()
    for module in read_adapter(place / names[0]).adapter:
        layer: Any = theirs.get_submodule(f"base_model.model.{module}")
        with torch.no_grad():
            for weight, name in zip(weights, names, strict=True):
                change = layer.get_delta_weight(name)
                expected.get_submodule(module).get_parameter("weight").add_(weight * change)
    ids = random_ids()
    assert torch.allclose(logits_of(found, ids), logits_of(expected, ids), atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("a", "needs two adapter folders or more, got 1"),
        ("a b --weights .5", "--weights gives 1 numbers for 2 adapters; give one for each"),
        ("a b --weights .5 .5 1", "--weights gives 3 numbers for 2 adapters"),
        ("a b --weights nan 1", "weights are finite numbers"),
        ("a b --weights inf 1", "weights are finite numbers"),
        ("a b --weights 0 0", "--weights are all 0, which merges nothing"),
        ("a b --weights x 1", "Invalid value for '--weights'"),
        ("a nameless", "does not say which base model the adapter belongs to"),
        ("a stranger", "adapters of one backbone can be merged, so give --model if both"),
        ("a missing", "missing"),
        ("a no_adapter", "holds neither adapter_config.json"),
        ("a run.yaml", "run.yaml' is no PEFT adapter"),
        ("a b --set merge.kind=linear", "needs equal ranks"),
        ("a b --set merge.kind=layer-swap", "at least three layers, these change 2"),
        ("a b c --set merge.kind=layer-swap", "a layer-swap is of two adapters, source and target"),
        (
            "a b --weights 1 1 --set merge.kind=layer-swap",
            "merge.weights: [1.0, 1.0] has no effect on merge.kind 'layer-swap', which has no",
        ),
        ("a b --set merge.kind=ties-delta --set merge.weights=auto", "has no effect on merge.kind"),
        ("a b --set merge.weights=[1,1] --weights 1 1", "the weights are given twice"),
        ("a b --adapter a", "--adapter belongs to a configuration"),
        ("run.yaml --weights 1 1", "--weights has no effect beside a configuration"),
        ("run.yaml --model smollm2", "--model has no effect beside a configuration"),
    ],
)
def test_what_cannot_be_merged_is_refused_before_the_backbone_is_loaded(
    place, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.setattr("grasp_lora.plans.session.open_context", None)
    (place / "run.yaml").write_text("model: smollm2\ndata: {target: {language: es}}\n")
    files = {*RANKS, "nameless", "stranger", "missing", "no_adapter", "run.yaml"}
    words = [str(place / one) if one in files else one for one in arguments.split()]
    done = merge(*words, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


def test_the_backbone_may_be_named(place, tmp_path):
    base = ("--model", place / "base")
    done = merge(place / "a", place / "nameless", *base, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    done = merge(place / "a", place / "stranger", *base, "--out", tmp_path / "other")
    assert done.exit_code == 0, done.output
    assert "names owner/other as its base model" in " ".join(done.output.split())


def test_other_weights_are_another_result(place, tmp_path):
    pair = (place / "a", place / "b")
    assert merge(*pair, "--weights", "1", "1", "--out", tmp_path / "out").exit_code == 0
    again = merge(*pair, "--weights", "1", "1", "--out", tmp_path / "out")
    assert "holds this result already" in " ".join(again.output.split())
    other = merge(*pair, "--weights", "1", "2", "--out", tmp_path / "out")
    assert other.exit_code == 2
    assert "weights" in other.output


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("A B --weights 1 2 --out C", "A B --weights 1 --weights 2 --out C"),
        ("--weights 1 -2 A B", "--weights 1 --weights -2 A B"),
        ("A --weights x 1", "A --weights x --weights 1"),
        ("A --weights", "A --weights"),
        ("A --weights=1 2", "A --weights=1 2"),
        ("A B --weights 1 --weights 2", "A B --weights 1 --weights 2"),
    ],
)
def test_every_number_after_an_option_belongs_to_it(given, expected):
    assert one_by_one(given.split(), "--weights") == expected.split()
