"""Whatever is wrong is said in one message, before anything is trained or written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from grasp_lora.base.files import open_run
from grasp_lora.cli import app
from grasp_lora.config.run_config import load_config
from grasp_lora.models.modules import base_fingerprint
from grasp_lora.plans.run import run
from grasp_lora.plans.single import train_adapter
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_job, write_rows

Fault = Callable[[Path, dict[str, Any]], None]
WEIGHTS = "adapter_model.safetensors"
SPANS = {"train": range(8), "dev": range(8, 12), "micro_dev": range(12, 16), "test": range(16, 20)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_backbone_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def workplace(tmp_path, base):
    (tmp_path / "base").symlink_to(base)
    return tmp_path


def refused(folder: Path, values: dict[str, Any], said: str) -> str:
    """Run; check that the error says it, and that nothing was written."""
    path = write_job(folder / "run.yaml", values)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        run(load_config(path), quiet=True)
    after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    assert after == before, "a refused run must not leave files"
    return str(caught.value)


def files(folder: Path, values: dict[str, Any]) -> dict[str, Path]:
    """Give the target a file for each part; return the files."""
    parts = {part: write_rows(folder / f"{part}.jsonl", span) for part, span in SPANS.items()}
    target = {"language": "es", "files": {part: str(path) for part, path in parts.items()}}
    values["data"] = values["data"] | {"target": target}
    return parts


def row(path: Path, number: int = 0) -> dict[str, Any]:
    return json.loads(path.read_text().split("\n")[number])


def append(path: Path, values: dict[str, Any]) -> None:
    path.write_text(path.read_text() + json.dumps(values) + "\n")


def missing_file(folder: Path, values: dict[str, Any]) -> None:
    files(folder, values)["dev"].unlink()


def empty_file(folder: Path, values: dict[str, Any]) -> None:
    files(folder, values)["train"].write_text("")


def empty_micro_dev(folder: Path, values: dict[str, Any]) -> None:
    files(folder, values)["micro_dev"].write_text("\n")


def no_micro_dev(folder: Path, values: dict[str, Any]) -> None:
    values["data"]["target"]["rows"].pop("micro_dev")


def zero_micro_dev(folder: Path, values: dict[str, Any]) -> None:
    values["data"]["target"]["rows"]["micro_dev"] = 0


def same_id(folder: Path, values: dict[str, Any]) -> None:
    parts = files(folder, values)
    append(parts["micro_dev"], row(parts["dev"]) | {"id": row(parts["train"])["id"]})


def same_question(folder: Path, values: dict[str, Any]) -> None:
    parts = files(folder, values)
    append(parts["micro_dev"], row(parts["train"]) | {"id": "new"})


def same_context(folder: Path, values: dict[str, Any]) -> None:
    parts = files(folder, values)
    append(parts["micro_dev"], row(parts["train"]) | {"id": "new", "question": "Another one?"})


def parallel_languages(folder: Path, values: dict[str, Any]) -> None:
    files(folder, values)
    english = write_rows(folder / "en.jsonl", SPANS["test"])
    values["data"]["source"] = {"language": "en", "files": {"train": str(english)}}


def parallel_contexts(folder: Path, values: dict[str, Any]) -> None:
    parts = files(folder, values)
    english = write_rows(folder / "en.jsonl", range(4), prefix="en")
    append(english, row(parts["test"]) | {"id": "en-new", "question": "In English?"})
    values["data"]["source"] = {"language": "en", "files": {"train": str(english)}}


def too_few_rows(folder: Path, values: dict[str, Any]) -> None:
    path = write_rows(folder / "all.jsonl", range(6))
    rows = {"train": 8, "dev": 4, "micro_dev": 4}
    values["data"]["target"] = {"language": "es", "files": str(path), "rows": rows}


def beside(folder: Path, values: dict[str, Any], **changes: Any) -> Path:
    """Give the target a file for each part, and extra rows; return the file of these."""
    files(folder, values)
    path = write_rows(folder / "extra.jsonl", range(8), prefix="x")
    values["data"]["extra"] = {"files": str(path)} | changes
    return path


def extra_weight_of_0(folder: Path, values: dict[str, Any]) -> None:
    beside(folder, values, weight=0)


def negative_extra_weight(folder: Path, values: dict[str, Any]) -> None:
    beside(folder, values, weight=-1)


def huge_extra_weight(folder: Path, values: dict[str, Any]) -> None:
    beside(folder, values, weight=2000)


def extra_without_files(folder: Path, values: dict[str, Any]) -> None:
    beside(folder, values)
    del values["data"]["extra"]["files"]


def missing_extra_file(folder: Path, values: dict[str, Any]) -> None:
    beside(folder, values).unlink()


def extra_of_another_task(folder: Path, values: dict[str, Any]) -> None:
    path = beside(folder, values)
    path.write_text(json.dumps({"id": "x0", "article": "A house.", "summary": "House."}) + "\n")


def extra_preset_of_another_task(folder: Path, values: dict[str, Any]) -> None:
    beside(folder, values, files="xlsum")


def preset_of_another_task_for_tests(folder: Path, values: dict[str, Any]) -> None:
    files(folder, values)
    values["data"]["tests"] = {"news": {"language": "es", "files": "xlsum"}}


def extra_file_for_each_part(folder: Path, values: dict[str, Any]) -> None:
    beside(folder, values, files={"train": str(beside(folder, values))})


def extra_leaks_to_dev(folder: Path, values: dict[str, Any]) -> None:
    path = beside(folder, values)
    append(path, row(folder / "dev.jsonl") | {"id": "new", "question": "Another one?"})


def extra_leaks_to_test(folder: Path, values: dict[str, Any]) -> None:
    path = beside(folder, values)
    append(path, row(folder / "test.jsonl") | {"id": "new"})


def extra_leaks_to_a_further_test_set(folder: Path, values: dict[str, Any]) -> None:
    path = beside(folder, values)
    values["data"]["tests"] = {"news": {"language": "es", "files": str(path)}}


def all_extra_parallel(folder: Path, values: dict[str, Any]) -> None:
    write_rows(beside(folder, values), SPANS["test"])


def too_few_extra_rows(folder: Path, values: dict[str, Any]) -> None:
    beside(folder, values, rows=20)


def extra_without_target_rows(folder: Path, values: dict[str, Any]) -> None:
    beside(folder, values)
    del values["data"]["target"]["files"]["train"]


def extra_without_target(folder: Path, values: dict[str, Any]) -> None:
    beside(folder, values)
    del values["data"]["target"]


def short_search(folder: Path, values: dict[str, Any]) -> None:
    values["controller"] = {"interval": 9, "rows": 4}


def too_few_to_learn_weights(folder: Path, values: dict[str, Any]) -> None:
    values["data"]["target"]["rows"] |= {"micro_dev": 2}
    values["controller"] |= {"probe_rows": "micro-dev"}
    values["merge"] = {"weights": "auto"}


def too_few_to_merge_after(folder: Path, values: dict[str, Any]) -> None:
    values["data"]["target"]["rows"] |= {"micro_dev": 2, "dev": 1}
    values["merge"] = {"when": "after"}


def linear_merge_of_other_ranks(folder: Path, values: dict[str, Any]) -> None:
    values["adapters"] = {"source": str(adapter(folder, r=2))}
    values["lora"] = {"r": 5}
    values["merge"] = {"kind": "linear"}


def unscaled_merge_of_two_scalings(folder: Path, values: dict[str, Any]) -> None:
    path = edited(folder, CONFIG, alpha_pattern={"q_proj": 3})
    values["adapters"] = {"source": str(path)}
    values["merge"] = {"weights": "unscaled"}


def scope_of_one_group(folder: Path, values: dict[str, Any]) -> None:
    values["lora"] = {"target_modules": ["q_proj"]}
    values["scope"] = "module-type"


def reward_that_is_not_there(folder: Path, values: dict[str, Any]) -> None:
    values["controller"] |= {"reward": "no_such_module:best"}


def crossed_bounds(folder: Path, values: dict[str, Any]) -> None:
    values["controller"] = {"low": 0.6, "high": 0.2}


def bound_of_one(folder: Path, values: dict[str, Any]) -> None:
    values["controller"] = {"high": 1.0}


def negative_bound(folder: Path, values: dict[str, Any]) -> None:
    values["controller"] = {"low": -0.1}


def unknown_modules(folder: Path, values: dict[str, Any]) -> None:
    values["lora"] = {"target_modules": ["q_prj"]}


def begun_run(folder: Path, values: dict[str, Any]) -> None:
    """Leave a run as a crash does: its first stage is done, the others are not."""
    before = load_config(write_job(folder / "before.yaml", values))
    open_run(folder / "run", before.to_dict())
    train_adapter(before, "target", folder / "run" / "adapters" / "target")


def another_run(folder: Path, values: dict[str, Any]) -> None:
    begun_run(folder, values | {"seed": 1})


def changed_rows(folder: Path, values: dict[str, Any]) -> None:
    parts = files(folder, values)
    begun_run(folder, values)
    append(parts["train"], row(parts["train"]) | {"id": "new", "question": "One more?"})


def foreign_folder(folder: Path, values: dict[str, Any]) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "thesis.tex").write_text("precious")


FAULTS: dict[Fault, str] = {
    missing_file: r"data\.target\.files\.dev: '.*dev\.jsonl' does not exist; correct the path",
    empty_file: r"train\.jsonl is empty; it needs at least one row",
    empty_micro_dev: r"micro_dev\.jsonl is empty",
    no_micro_dev: r"data\.target\.rows\.micro_dev: required, not given",
    zero_micro_dev: r"data\.target\.rows\.micro_dev: 0 rows, but at least 1 is needed",
    same_id: r"'q0' of target/train and 'q0' of target/micro_dev \(the same id\).* give splits",
    same_question: r"'q0' of target/train and 'new' of target/micro_dev \(the same group\)",
    same_context: r"'q0' of target/train and 'new' of target/micro_dev \(the same group\)",
    parallel_languages: r"'q16' of source/train and 'q16' of target/test \(the same id\)",
    parallel_contexts: r"'en-new' of source/train and 'q16' of target/test .* --allow-leakage",
    too_few_rows: r"too few rows: .* need 16, there are 6 .* ask for fewer or give more rows",
    extra_weight_of_0: r"data\.extra\.weight: got 0; give a number above 0",
    negative_extra_weight: r"data\.extra\.weight: got -1; give a number above 0",
    huge_extra_weight: r"data\.extra\.weight: got 2000; give a number of at most 1000",
    extra_without_files: r"1 fault\n  data\.extra\.files: required",
    missing_extra_file: r"data\.extra\.files: '.*extra\.jsonl' does not exist; correct the path",
    extra_of_another_task: r"extra\.jsonl: no column for context.*name the right one in columns",
    extra_preset_of_another_task: r"data\.extra\.files: the preset xlsum is for .*summarization",
    preset_of_another_task_for_tests: r"data\.tests\.news\.files: the preset xlsum is for",
    extra_file_for_each_part: r"1 fault\n  data\.extra\.files: .*one file",
    extra_leaks_to_dev: r"'q8' of target/dev and 'new' of extra/train \(the same group\).* --allow",
    extra_leaks_to_test: r"'q16' of target/test and 'new' of extra/train \(the same group\)",
    extra_leaks_to_a_further_test_set: r"8 pairs .*'x0' of extra/train and 'x0' of tests/news",
    all_extra_parallel: r"data\.extra: all 4 rows are left out.*; give other rows",
    too_few_extra_rows: r"too few rows: the splits \{'extra': 20\} need 20, there are 8",
    extra_without_target_rows: r"1 fault\n  data\.target\.files\.train: required, not given",
    extra_without_target: r"1 fault\n  data\.target: required",
    short_search: r"has 4 optimizer steps, fewer than the 9 .*: raise train\.search\.epochs",
    too_few_to_learn_weights: r"weights: auto.* at least 4 .* got 2; raise .*rows\.micro_dev",
    too_few_to_merge_after: r"when: after.* at least 4 .* got 3; raise .*rows\.micro_dev",
    linear_merge_of_other_ranks: r"'linear' merge .*equal ranks, but .*\[2, 5\]; use kind 'cat'",
    unscaled_merge_of_two_scalings: r"need one scaling .* adapter 1 has .*merge\.weights as num",
    scope_of_one_group: r"scope: 'module-type' needs at least two .* one, q_proj; set scope: glo",
    reward_that_is_not_there: r"controller\.reward 'no_such_module:best' cannot be loaded",
    crossed_bounds: r"controller: .*0\.6.*0\.2",
    bound_of_one: r"controller: .*1\.0",
    negative_bound: r"controller: .*-0\.1",
    unknown_modules: r"'q_prj'.*q_proj",
    another_run: r"/target' holds a finished .* inputs: seed was 1, is 42; .* Choose .* pass --ov",
    changed_rows: r"other inputs: the examples of target/train have changed\. Choose another",
    foreign_folder: r"is not empty and no run of grasp-lora.*set another output",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_a_faulty_job_is_refused_before_any_work(workplace, fault):
    values = job(workplace)
    fault(workplace, values)
    refused(workplace, values, FAULTS[fault])


def adapter(folder: Path, **about: Any) -> Path:
    model = about.pop("model", None) or tiny_model()
    return tiny_adapter_folder(folder / "adapter", model, **about)


def edited(folder: Path, name: str, **values: Any) -> Path:
    path = adapter(folder)
    stored = json.loads((path / name).read_text()) if (path / name).exists() else {}
    (path / name).write_text(json.dumps(stored | values))
    return path


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    path = adapter(folder)
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS)
    return path


def truncated(folder: Path) -> Path:
    path = adapter(folder)
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100])
    return path


def pickled(folder: Path) -> Path:
    path = adapter(folder)
    (path / WEIGHTS).rename(path / "adapter_model.bin")
    return path


def poisoned(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def with_embedding(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(2, 2)


CONFIG = "adapter_config.json"
ADAPTERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "another base": (
        lambda f: edited(
            f, "grasp_lora.json", base_fingerprint=base_fingerprint(tiny_model(seed=7))
        ),
        r"other base weights \(fingerprint .*; load the base model",
    ),
    "another vocabulary": (
        lambda f: edited(f, "grasp_lora.json", vocab_size=300),
        r"vocabulary of 300 tokens, but this model has 272",
    ),
    "more layers": (lambda f: adapter(f, model=tiny_model(layers=3)), r"layers\.2\."),
    "another width": (lambda f: adapter(f, model=tiny_model(width=32)), r"32.*16"),
    "truncated": (truncated, r"is damaged or cut short.*copy it again"),
    "NaN": (lambda f: changed(f, poisoned), r"holds NaN or infinite values"),
    "pickle": (pickled, r"only adapter_model\.bin, a pickle"),
    "DoRA": (lambda f: edited(f, CONFIG, use_dora=True), r"use_dora=True means DoRA"),
    "bias": (lambda f: edited(f, CONFIG, bias="all"), r"bias='all' means trained bias vectors"),
    "modules to save": (
        lambda f: edited(f, CONFIG, modules_to_save=["lm_head"]),
        r"modules_to_save=\['lm_head'\] means modules trained in full",
    ),
    "embedding": (
        lambda f: changed(f, with_embedding),
        r"embed_tokens\.weight' \[2, 2\], which .* \[272, 16\].*save_embedding_layers=False",
    ),
    "output layer": (
        lambda f: adapter(f, targets=["q_proj", "lm_head"]),
        r"'base_model\.model\.lm_head\.base_layer\.weight' is a base weight saved",
    ),
    "another task": (
        lambda f: edited(f, CONFIG, task_type="FEATURE_EXTRACTION"),
        r"made for the task type 'FEATURE_EXTRACTION'",
    ),
    "modules beyond the config": (
        lambda f: edited(f, CONFIG, target_modules=["q_proj"]),
        r"v_proj\.lora_A\.weight' and 3 more have no place in this model",
    ),
    "fewer modules than the config": (
        lambda f: edited(f, CONFIG, target_modules=["q_proj", "v_proj", "k_proj"]),
        r"k_proj\.lora_A\.weight' and 3 more have no tensor in",
    ),
    "no adapter": (lambda f: write_rows(f / "x", [1]).parent, r"holds no adapter_config\.json"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
def test_an_adapter_that_cannot_be_used_is_refused_by_name(workplace, kind):
    make, said = ADAPTERS[kind]
    folder = make(workplace)
    values = job(workplace, adapters={"target": str(folder)})
    assert folder.name in refused(workplace, values, said)


def test_a_full_disk_is_seen_before_any_work(workplace, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=1000))
    refused(workplace, job(workplace), r"needs about .* GB, but only 0\.00 GB are free; free some")


def test_a_diverging_run_stops_with_a_diagnosis_and_its_last_good_checkpoint(workplace):
    section = {"epochs": 3, "learning_rate": 1e30, "save_every": 1}
    values = job(workplace, train={"search": section})
    done = CliRunner().invoke(app, ["run", str(write_job(workplace / "run.yaml", values))])
    assert done.exit_code == 2
    last = done.output.strip().split("error: ")[-1]
    assert "search, step 2: training loss is nan" in last
    assert "lower the learning rate" in last
    # checkpoint-1 holds the weights that gave the NaN.
    assert "no good checkpoint was written" in last
    assert "Traceback" not in done.output
    assert not (workplace / "run" / "final").exists()


def test_a_run_that_diverges_later_names_the_checkpoint_before(workplace):
    from grasp_lora.workbench.fit import _last_good

    for step in (2, 4, 6):
        (workplace / f"checkpoint-{step}").mkdir()
    for step in (2, 4):
        (workplace / f"checkpoint-{step}" / "grasp.json").touch()
    assert _last_good(workplace, 4).endswith("checkpoint-2")
    assert _last_good(workplace, 5).endswith("checkpoint-4")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "model.name=tests",
            "error: 'tests' has no config.json, so it is not a transformers model",
        ),
        ("controller.high=2", "controller"),
        ("lora.target_modules=[q_prj]", "q_proj"),
        ("train.search.max_steps=1", "error: the search has 1 optimizer steps, fewer than"),
    ],
)
def test_the_command_prints_one_error_without_a_traceback(workplace, monkeypatch, change, said):
    monkeypatch.chdir(Path(__file__).parents[2])
    path = write_job(workplace / "run.yaml", job(workplace))
    done = CliRunner().invoke(app, ["run", str(path), "--set", change])
    assert done.exit_code == 2
    assert said in done.output
    assert "Traceback" not in done.output
    assert not (workplace / "run").exists()
