"""The stages one by one on the command line: a folder in, a folder out, nothing done twice."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grasp_lora.base.files import read_json
from grasp_lora.cli import app
from grasp_lora.config.run_config import RunConfig, load_config
from grasp_lora.plans.run import run
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_job, write_rows


def command(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def refusal(*arguments: str | Path) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    return done.output.split("error: ")[1]


def stamps(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def chain(config: Path, out: Path) -> dict[str, tuple[str | Path, ...]]:
    """Return the commands of the whole job, in order, by the folder each writes."""
    merged, search, final = out / "merged", out / "search", out / "final"
    ratio = search / "ratio.json"
    return {
        "source": ("train", config, "--role", "source", "--out", out / "source"),
        "target": ("train", config, "--role", "target", "--out", out / "target"),
        "merged": (
            *("merge", config, "--adapter", out / "source", "--adapter", out / "target"),
            *("--out", merged),
        ),
        "search": ("search", config, "--merged", merged, "--out", search),
        "final": ("finetune", config, "--start", merged, "--ratio", ratio, "--out", final),
        "score": ("evaluate", final, "--config", config, "--out", out / "score"),
        "zero": ("evaluate", "none", "--config", config, "--out", out / "zero"),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return (configuration file, commands by folder, folder of the results)."""
    folder = tmp_path_factory.mktemp("stages")
    tiny_backbone_folder(folder / "base")
    config = write_job(folder / "run.yaml", job(folder))
    out = folder / "out"
    commands = chain(config, out)
    for name, arguments in commands.items():
        assert f"wrote {out / name}" in command(*arguments).replace("\n", "")
    return config, commands, out


def test_the_stages_one_by_one_give_what_run_gives(finished):
    config, _, out = finished
    whole = run(load_config(config), quiet=True)
    for one, other in (
        ("source", "adapters/source"),
        ("target", "adapters/target"),
        ("merged", "merged"),
        ("search/adapter", "search/adapter"),
        ("final", "final"),
    ):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (out / one / name).read_bytes() == (whole / other / name).read_bytes(), one
    assert (out / "search/rounds.jsonl").read_bytes() == (whole / "rounds.jsonl").read_bytes()
    assert read_json(out / "score/scores.json") == read_json(
        whole / "evaluations/final/scores.json"
    )
    assert not list(out.glob("*.work"))
    assert (out / "zero/scores.json").exists()


def test_a_finished_stage_is_not_done_again(finished):
    _, commands, out = finished
    before = stamps(out)
    for arguments in commands.values():
        command(*arguments)
    assert stamps(out) == before


OTHER = dict.fromkeys(("source", "search", "final", "zero"), ("--seed", "7"))
OTHER["merged"] = ("--set", "merge.weights=[0.25, 0.75]")  # the seed does not change a merge


@pytest.mark.parametrize("name", OTHER)
def test_a_finished_stage_of_other_settings_is_replaced_only_when_asked(finished, name, tmp_path):
    _, commands, out = finished
    before = stamps(out)
    said = " ".join(refusal(*commands[name], *OTHER[name]).split())
    assert "pass --overwrite" in said
    assert (
        "merge.weights was none, is [0.25, 0.75]" if name == "merged" else "seed was 42, is 7"
    ) in said
    assert stamps(out) == before
    shutil.copytree(out / name, tmp_path / name)
    elsewhere = [tmp_path / name if a == out / name else a for a in commands[name]]
    old = read_json(tmp_path / name / "stage.json")["key"]
    command(*elsewhere, *OTHER[name], "--overwrite")
    assert read_json(tmp_path / name / "stage.json")["key"] != old


@pytest.mark.parametrize("name", ["source", "merged", "search", "final", "zero"])
@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
def test_a_folder_of_the_users_own_is_never_touched(finished, name, overwrite, tmp_path):
    _, commands, out = finished
    folder = tiny_adapter_folder(tmp_path / "mine", tiny_model())
    before = stamps(folder)
    elsewhere = [folder if a == out / name else a for a in commands[name]]
    assert "is not empty and no result of grasp-lora" in refusal(*elsewhere, *overwrite)
    assert stamps(folder) == before


def test_checkpoints_of_other_settings_are_not_gone_on_from(finished, tmp_path):
    _, commands, out = finished
    folder = tmp_path / "adapter"
    train = [folder if a == out / "source" else a for a in commands["source"]]
    changes = ("learning_rate=1e30", "save_every=1", "epochs=3")
    diverging = [part for change in changes for part in ("--set", f"train.source.{change}")]
    assert "training loss is nan" in refusal(*train, *diverging)
    assert (tmp_path / "adapter.work" / "checkpoint-1").exists()
    said = " ".join(refusal(*train).split())
    assert "an interrupted result made with other inputs: train.source.epochs was 3, is 1;" in said
    assert "train.source.learning_rate was 1e+30, is 0.0001" in said
    assert "train.source.save_every was 1, is none" in said
    command(*train, "--overwrite")
    assert (folder / "adapter_model.safetensors").read_bytes() == (
        out / "source" / "adapter_model.safetensors"
    ).read_bytes()
    assert not (tmp_path / "adapter.work").exists()


def test_an_input_written_anew_is_not_taken_for_the_old_one(finished, tmp_path):
    _, commands, out = finished
    source = shutil.copytree(out / "source", tmp_path / "source")
    merge = [
        tmp_path / a.name if a in (out / "source", out / "merged") else a
        for a in commands["merged"]
    ]
    command(*merge)
    command(*merge)
    shutil.copytree(out / "target", source, dirs_exist_ok=True)
    said = " ".join(refusal(*merge).split())
    assert "the folder given as source has another content" in said


def test_a_moved_run_goes_on(finished, tmp_path):
    config, _, _ = finished
    loaded = load_config(config, [f"output={tmp_path / 'first'}"])
    whole = run(loaded, quiet=True)
    moved = whole.rename(tmp_path / "second")
    (moved / "done.json").unlink()
    before = (moved / "shipped" / "stage.json").stat().st_mtime_ns
    run(load_config(config, [f"output={moved}"]), quiet=True)
    assert (moved / "shipped" / "stage.json").stat().st_mtime_ns == before


def test_a_plain_fraction_is_a_ratio_too(finished, tmp_path):
    config, _, out = finished
    start = ("finetune", config, "--start", out / "merged", "--out", tmp_path / "half")
    command(*start, "--ratio", "0.5")
    assert read_json(tmp_path / "half" / "stage.json")["ratio"] == 0.5
    for given in ("50", "50%"):
        said = refusal(*start, "--ratio", given)
        assert f"--ratio '{given}' is no fraction in [0, 1]; " in said
        assert "write 0.5" in said
    assert "like 0.4" in refusal(*start, "--ratio", "-1")


def test_one_labelled_file_is_divided_by_itself(finished, tmp_path, capsys):
    config, _, _ = finished
    values = json.loads(config.read_text())
    labelled = write_rows(tmp_path / "all.jsonl", range(40))
    values["data"]["target"] = {
        "language": "es",
        "files": str(labelled),
        "rows": {"test": 6},
    }
    values["output"] = str(tmp_path / "auto")
    out = command("run", write_job(tmp_path / "auto.yaml", values))
    assert "target labels used: 16 train, 14 dev, 4 micro_dev; tested on 6" in out
    splits = read_json(tmp_path / "auto/data.json")["target"]["splits"]
    assert {name: len(ids) for name, ids in splits.items()} == {
        "train": 16,
        "dev": 14,
        "micro_dev": 4,
        "test": 6,
    }
    assert len({i for ids in splits.values() for i in ids}) == 40
    scores = read_json(tmp_path / "auto/scores.json")["systems"]
    assert [s["sets"]["test"]["n"] for s in scores] == [6]


def test_without_test_rows_a_run_ends_without_scores(finished, tmp_path):
    config, _, _ = finished
    values = json.loads(config.read_text()) | {"output": str(tmp_path / "unscored")}
    values["data"]["target"]["rows"].pop("test")
    values["evaluate"] = {"baselines": True}
    out = run(RunConfig.model_validate(values), quiet=True)
    assert read_json(out / "scores.json")["systems"] == []
    assert (out / "report.md").exists()
    assert (out / "final" / "adapter_model.safetensors").exists()
    assert not (out / "baselines").exists()
