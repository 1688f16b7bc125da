"""`final/` of a run: what goes out of the result, and how it stands beside the stage's folder."""

import shutil

import pytest
from typer.testing import CliRunner

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.adapters.opening import named_base_model
from grasp_lora.base.files import read_json
from grasp_lora.cli import app
from grasp_lora.config.run_config import RunConfig
from grasp_lora.plans import published
from grasp_lora.plans.executor import protect_inputs
from grasp_lora.plans.published import publish_result
from grasp_lora.plans.run import run
from grasp_lora.plans.single import evaluate_adapter
from grasp_lora.stages.folder import check_input
from helpers import tiny_backbone_folder
from jobs import job, write_job

WEIGHTS = "adapter_model.safetensors"
GOES_OUT = {"adapter_config.json", WEIGHTS, "grasp_lora.json", "README.md"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    tiny_backbone_folder(folder / "base")
    return folder


def config_of(place, out, **changes) -> RunConfig:
    evaluate = {"baselines": False, "max_new_tokens": 2}
    return RunConfig.model_validate(job(place, output=str(out), evaluate=evaluate, **changes))


@pytest.fixture(scope="module")
def whole(place):
    return run(config_of(place, place / "whole"), quiet=True)


@pytest.fixture
def copy(place, whole, tmp_path):
    """Return the finished run in a folder of its own, and its settings."""
    return shutil.copytree(whole, tmp_path / "run"), config_of(place, tmp_path / "run")


def names_in(folder) -> set[str]:
    return {one.name for one in folder.iterdir()}


def state_of(folder) -> dict:
    return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.rglob("*") if f.is_file()}


def test_final_has_what_goes_out_and_the_stage_what_resuming_needs(whole):
    assert names_in(whole / "final") == GOES_OUT
    assert "stage.json" in names_in(whole / "shipped")
    for name in GOES_OUT - {"README.md"}:
        assert (whole / "final" / name).read_bytes() == (whole / "shipped" / name).read_bytes()
    assert read_json(whole / "scores.json")["systems"][-1]["path"] == "final"
    assert not list(whole.glob("*.work"))


def test_a_result_that_was_removed_is_there_again_and_no_stage_is_done(copy, monkeypatch):
    out, config = copy
    before = (out / "final" / WEIGHTS).read_bytes()
    marks = state_of(out / "shipped")
    shutil.rmtree(out / "final")
    run(config, quiet=True)
    assert (out / "final" / WEIGHTS).read_bytes() == before
    assert names_in(out / "final") == GOES_OUT
    assert state_of(out / "shipped") == marks


def test_a_card_that_was_completed_is_no_damage(copy):
    out, config = copy
    card = out / "final" / "README.md"
    card.write_text(card.read_text() + "\nLicence: ours.\n")
    before = state_of(out)
    run(config, quiet=True)
    assert state_of(out) == before


def test_a_damaged_result_is_refused_as_input_and_kept_when_made_again(copy, capsys):
    out, config = copy
    good = (out / "final" / WEIGHTS).read_bytes()
    (out / "final" / WEIGHTS).write_bytes(good[:-1])
    with pytest.raises(ValueError, match=r"is damaged: 'final/adapter_model.safetensors' has"):
        check_input(out / "final")
    with pytest.raises(ValueError, match="is damaged"):
        evaluate_adapter(config, out / "final", out.parent / "scored")
    run(config)
    said = "".join(capsys.readouterr().err.split())  # a long path is broken within
    assert "final'isdamaged:'adapter_model.safetensors'has" in said
    assert "Itiskeptas'final.damaged'." in said
    assert (out / "final" / WEIGHTS).read_bytes() == good
    assert (out / "final.damaged" / WEIGHTS).read_bytes() == good[:-1]
    check_input(out / "final")


@pytest.mark.parametrize("after", ["rmtree", "sync", "sync_folder"])
def test_a_crash_while_publishing_is_made_good_by_the_next_start(copy, monkeypatch, after):
    out, config = copy
    good = (out / "final" / WEIGHTS).read_bytes()
    (out / "done.json").unlink()
    used = getattr(published.shutil if after == "rmtree" else published, after)

    def then_killed(place, *more, **options):
        used(place, *more, **options)
        if after != "rmtree" or place == out / "final":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(published.shutil if after == "rmtree" else published, after, then_killed)
        with pytest.raises(KeyboardInterrupt):
            publish_result(out)
    run(config, quiet=True)
    assert names_in(out / "final") == GOES_OUT
    assert (out / "final" / WEIGHTS).read_bytes() == good
    assert not (out / "final.work").exists()


def test_the_base_of_a_result_is_the_one_that_its_run_loaded(place, whole):
    assert named_base_model(whole / "final") == str(place / "base")
    assert read_adapter(whole / "final").config["base_model_name_or_path"] is None


def test_a_run_of_an_earlier_version_is_refused_until_its_stage_is_renamed(copy, tmp_path):
    out, config = copy
    shutil.rmtree(out / "final")
    (out / "shipped").rename(out / "final")
    before, path = state_of(out), write_job(tmp_path / "run.json", config.to_dict())
    done = CliRunner().invoke(app, ["run", str(path)])
    said = " ".join(done.output.split())
    assert done.exit_code == 2
    assert "made by an earlier version, which kept the stage of its result in final/" in said
    assert "rename that folder to shipped, or set another output" in said
    assert state_of(out) == before
    (out / "final").rename(out / "shipped")
    done = CliRunner().invoke(app, ["run", str(path)])
    assert done.exit_code == 0, done.output
    assert names_in(out / "final") == GOES_OUT


def test_the_result_of_a_run_is_no_input_of_itself(copy):
    out, config = copy
    own = config.adapters.model_copy(update={"source": out / "final"})
    with pytest.raises(ValueError, match="final"):
        protect_inputs(config.model_copy(update={"adapters": own}), [], [out / "final"])
    (out / "done.json").unlink()
    with pytest.raises(ValueError, match="final"):
        run(config.model_copy(update={"adapters": own}), quiet=True)
    assert names_in(out / "final") == GOES_OUT
