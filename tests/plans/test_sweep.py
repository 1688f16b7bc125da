"""A sweep: what is trained once, what each cell does, what its table says, and what is refused."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grasp_lora.base.files import read_json
from grasp_lora.base.words import in_markdown
from grasp_lora.cli import app
from grasp_lora.config.run_config import ConfigError
from grasp_lora.config.sweep import load_sweep
from grasp_lora.plans import worker
from grasp_lora.plans.compare import compare_methods
from grasp_lora.plans.launch import LAUNCHERS, Pool
from grasp_lora.plans.pool import Engine
from grasp_lora.plans.run import run
from grasp_lora.plans.status import folder_status
from grasp_lora.plans.sweep import sweep, sweep_plan
from grasp_lora.report.sweep import shipped_rows
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_job, write_rows

LANGUAGES = ("de", "es", "fr", "tr")
WEIGHTS = "adapter_model.safetensors"
SHARED = Path(__file__).parents[3] / "shared" / "data" / "qa"


class Here:
    """Does each stage in this process as it is started, which spares the imports of another."""

    def start(self, jobs):
        return [Ended(job) for job in jobs]


class Ended:
    def __init__(self, job):
        try:
            self.code = worker.main([str(job.place), job.stage, *job.flags])
        except Exception as error:
            job.note(f"{type(error).__name__}: {error}")
            self.code = 1

    def poll(self):
        return self.code

    def stop(self):
        raise AssertionError("it has ended")


@pytest.fixture(autouse=True)
def here(monkeypatch):
    @contextmanager
    def opened(place, pool, threads):
        yield Here()

    monkeypatch.setitem(LAUNCHERS, "here", Engine(opened, pause=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a backbone, a base configuration and questions in four languages."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny_backbone_folder(folder / "base")
    values = job(folder)
    del values["data"]["target"]["language"], values["recipe"]
    values["data"]["source"]["files"] = str(write_rows(folder / "en.jsonl", range(20), "en"))
    for language in LANGUAGES:
        write_rows(folder / f"{language}.jsonl", range(100, 130), language)
    values["train"] = {"epochs": 1, "batch_size": 4}
    write_job(folder / "base.yaml", values)
    return folder


def asked(folder, **changes):
    values = {
        "base": str(folder / "base.yaml"),
        "languages": {n: {"data.target.files": str(folder / f"{n}.jsonl")} for n in LANGUAGES},
        "configurations": {
            "grasp": {"settings": {"recipe": "grasp"}},
            "simple": {"settings": {"recipe": "grasp"}, "methods": ["average", "target"]},
        },
        "seeds": [7],
    }
    return load_sweep(write_job(folder / "sweep.yaml", values | changes))


def in_pool(**changes):
    return Pool(**({"jobs": 2, "threads": 1, "on": "here"} | changes))


@pytest.fixture(scope="module")
def done(folder):
    with pytest.MonkeyPatch.context() as patch:

        @contextmanager
        def opened(place, pool, threads):
            yield Here()

        patch.setitem(LAUNCHERS, "here", Engine(opened, pause=0))
        return sweep(asked(folder), folder / "out", in_pool(), quiet=True), folder / "out"


def test_what_nothing_tells_apart_is_trained_once(folder):
    whole, parts = asked(folder, seeds=[7, 8])
    plan, _ = sweep_plan(parts, whole.seeds)
    kinds = [stage.kind for stage in plan.stages.values()]
    assert (kinds.count("train"), kinds.count("cell")) == (1 + len(LANGUAGES), 16)
    cells = [stage for stage in plan.stages.values() if stage.kind == "cell"]
    assert len({stage.inputs["source"] for stage in cells}) == 1
    assert len({stage.inputs["target"] for stage in cells}) == len(LANGUAGES)
    same = {"recipe": "grasp"}
    other = {"lora": {"settings": same | {"lora.r": 2}}, "base": {"settings": same}}
    whole, parts = asked(folder, configurations=other)
    kinds = [stage.kind for stage in sweep_plan(parts, whole.seeds)[0].stages.values()]
    assert kinds.count("train") == 2 * (1 + len(LANGUAGES)), "another rank is another adapter"


def test_every_cell_is_in_the_table(done):
    found, out = done
    assert found["failed"] == {}
    rows = [(one["language"], one["configuration"], one["system"]) for one in found["cells"]]
    wanted = (("grasp", "grasp"), ("simple", "target"), ("simple", "average"))
    assert sorted(rows) == sorted((n, *one) for n in LANGUAGES for one in wanted)
    assert read_json(out / "sweep.json")["cells"] == json.loads(json.dumps(found["cells"]))
    table = (out / "sweep.md").read_text()
    for language in LANGUAGES:
        assert f"| {language} | grasp | grasp | 1 |" in table
    assert folder_status(out)["count"] == {"done": 5 + 8}


def test_a_cell_is_the_run_or_the_comparison_that_it_names(folder, done, tmp_path):
    found, out = done
    _, parts = asked(folder)
    adapters = {
        role: next((out / "adapters").glob(f"{role}-{language}-*"))
        for role, language in (("source", "en"), ("target", "es"))
    }
    part = next(one for one in parts if (one.language, one.configuration) == ("es", "grasp"))
    given = part.config.adapters.model_copy(update=adapters)
    data = part.config.data.model_copy(update={"split_seed": part.config.seed})
    config = part.config.model_copy(
        update={"adapters": given, "seed": 7, "output": tmp_path / "alone", "data": data}
    )
    alone = run(config, quiet=True)
    cell = out / "es-grasp-s7" / "run" / "final" / WEIGHTS
    assert cell.read_bytes() == (alone / "final" / WEIGHTS).read_bytes()
    (row,) = (c for c in found["cells"] if c["cell"] == "es-grasp-s7")
    (final,) = (s for s in read_json(alone / "scores.json")["systems"] if s["slug"] == "final")
    (scores,) = (one["scores"] for one in final["sets"].values())
    assert row["scores"]["test"] == {name: one["value"] for name, one in scores.items()}
    assert row["ratio"] == read_json(alone / "ratio.json")["ratio"]
    compared = compare_methods(
        config.model_copy(update={"seed": part.config.seed}),
        tmp_path / "compared",
        ("average", "target"),
        (7,),
        quiet=True,
    )
    ours = {c["system"]: c["scores"] for c in found["cells"] if c["cell"] == "es-simple-s7"}
    assert ours == {one["method"]: one["scores"] for one in compared["rows"]}


def test_a_second_start_does_only_what_is_missing(folder, done, monkeypatch):
    found, out = done
    monkeypatch.setattr(Here, "start", lambda *_: pytest.fail("nothing is left to do"))
    again = sweep(asked(folder), out, in_pool(), quiet=True)
    assert again == found


def test_a_changed_setting_is_refused_and_replaces_with_overwrite(folder, tmp_path):
    languages = {"es": {"data.target.files": str(folder / "es.jsonl")}}
    for recipe, methods in (("grasp", ["target"]), ("grasp", [])):
        out = tmp_path / f"out-{len(methods)}"

        def in_tokens(most, recipe=recipe, methods=methods):
            settings = {"recipe": recipe, "evaluate.max_new_tokens": most}
            variant = {"settings": settings, "methods": methods}
            return asked(folder, languages=languages, configurations={"one": variant})

        sweep(in_tokens(2), out, in_pool(), quiet=True)
        with pytest.raises(ValueError, match="evaluate.max_new_tokens was 2, is 3.*--overwrite"):
            sweep(in_tokens(3), out, in_pool(), quiet=True)
        found = sweep(in_tokens(3), out, in_pool(), overwrite=True, quiet=True)
        assert found["failed"] == {}
        assert len(found["cells"]) == 1


def test_a_cell_that_fails_is_named_and_the_others_go_on(folder, tmp_path):
    broken = {"recipe": "grasp", "train.finetune.learning_rate": 1e30}
    languages = {"es": {"data.target.files": str(folder / "es.jsonl")}}
    configurations = {
        "broken": {"settings": broken},
        "simple": {"settings": {"recipe": "grasp"}, "methods": ["target"]},
    }
    whole = asked(folder, languages=languages, configurations=configurations)
    found = sweep(whole, tmp_path / "out", in_pool(), quiet=True)
    assert [one["cell"] for one in found["cells"]] == ["es-simple-s7"]
    assert list(found["failed"]) == ["es-broken-s7"]
    assert "- `es-broken-s7`: failed" in (tmp_path / "out" / "sweep.md").read_text()


def test_a_cell_may_choose_its_recipe_from_adapters_that_are_given(folder, tmp_path):
    adapters = {
        f"adapters.{role}": str(tiny_adapter_folder(tmp_path / role, tiny_model(), r=2, seed=n))
        for n, role in enumerate(("source", "target"))
    }
    languages = {"es": {"data.target.files": str(folder / "es.jsonl")} | adapters}
    configurations = {
        "auto": {"settings": {"controller": {}, "budget": 9, "evaluate.baselines": True}}
    }
    whole = asked(folder, languages=languages, configurations=configurations)
    found = sweep(whole, tmp_path / "out", in_pool(), quiet=True)
    (cell,) = found["cells"]
    assert cell["system"] == "auto"
    chosen = read_json(tmp_path / "out" / "es-auto-s7" / "run" / "recipe.json")
    assert (cell["ships"], cell["dev_loss"]) == (chosen["ships"], chosen["dev_loss"])
    scores = read_json(tmp_path / "out" / "es-auto-s7" / "run" / "scores.json")
    losses = {
        one["name"].partition(",")[0]: f"{one['sets']['test']['scores']['loss']['value']:.3f}"
        for one in scores["systems"]
        if one["slug"] != "final"
    }
    titles, (row,) = shipped_rows(found)
    shown = dict(zip(titles, row, strict=True))
    assert len(losses) >= 4
    assert losses.items() <= shown.items()
    assert shown["shipped"].endswith(f": {chosen['ships']}")
    assert shown["shipped"].startswith(f"{cell['scores']['test']['loss']:.3f}")
    assert shown["expected"] == "–" or f"{-chosen['gain']['gain']:+.3f} [" in shown["expected"]
    assert (
        f"| {in_markdown(row[-2])} | {in_markdown(row[-1])} |"
        in (tmp_path / "out" / "sweep.md").read_text()
    )
    assert not (tmp_path / "out" / "adapters").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data in {SHARED.name} beside the checkout")
def test_four_languages_of_published_questions(folder, tmp_path):
    base = read_json(folder / "base.yaml")
    rows = {"train": 8, "dev": 4, "micro_dev": 4, "test": 4}
    data = base["data"] | {"max_length": 640, "max_faulty": 1.0}
    data["source"] = {"language": "en", "files": str(SHARED / "en_squad.jsonl")}
    data["source"]["rows"] = {"train": 8, "dev": 4}
    data["target"] = {"rows": rows}
    write_job(tmp_path / "base.yaml", base | {"data": data})
    languages = {
        n: {"data.target.files": str(SHARED / f"{n}.jsonl")} for n in ("ar", "de", "hi", "zh")
    }
    whole = asked(
        folder,
        base=str(tmp_path / "base.yaml"),
        languages=languages,
        configurations={"simple": {"settings": {"recipe": "grasp"}, "methods": ["target"]}},
    )
    found = sweep(whole, tmp_path / "out", in_pool(), quiet=True)
    assert found["failed"] == {}
    assert [one["language"] for one in found["cells"]] == ["ar", "de", "hi", "zh"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 1]}, "seeds: each seed once"),
        ({"seeds": []}, "seeds"),
        ({"languages": {}}, "languages"),
        ({"languages": {"../es": {}}}, r"languages\.\.\./es"),
        ({"configuration": {}}, "configuration"),
        ({"configurations": {"a": {"settings": {"recipy": "auto"}}}}, "de, a: .*recipy"),
        ({"base": "nowhere.yaml"}, "no configuration file at 'nowhere.yaml'"),
    ],
)
def test_a_faulty_file_is_one_error(folder, changes, message):
    with pytest.raises((ConfigError, FileNotFoundError), match=rf"(?s){message}"):
        asked(folder, **changes)


def test_an_unknown_method_and_a_pool_of_none_are_refused_before_any_work(folder, tmp_path):
    unknown = {"simple": {"settings": {"recipe": "grasp"}, "methods": ["magic"]}}
    whole = asked(folder, configurations=unknown)
    with pytest.raises(ValueError, match="no method 'magic'; choose from"):
        sweep(whole, tmp_path / "out", in_pool(), quiet=True)
    assert not (tmp_path / "out").exists()
    short = {"auto": {"settings": {"controller": {}, "budget": 1}}}
    with pytest.raises(ValueError, match="^de, auto: budget: 1 plain runs is too small"):
        sweep(asked(folder, configurations=short), tmp_path / "out", in_pool(), quiet=True)
    asked(folder)
    command = ["sweep", str(folder / "sweep.yaml"), "--out", str(tmp_path / "out"), "--jobs", "0"]
    told = CliRunner().invoke(app, command)
    assert (told.exit_code, "--jobs must be at least 1" in told.stderr) == (2, True)
