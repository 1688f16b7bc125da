"""A run that chooses its recipe, whole, on a tiny random backbone."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from grasp_lora.base.files import read_json, read_jsonl, write_json
from grasp_lora.cli import app
from grasp_lora.config.run_config import ConfigError, RunConfig, load_config
from grasp_lora.core.recipes.chooser import BESIDE, Decision, Finalist
from grasp_lora.core.recipes.recipe import Recipe
from grasp_lora.plans import auto, executor, session
from grasp_lora.plans.run import run
from grasp_lora.report.choice import ship_parts, tried_lines
from grasp_lora.stages import prune
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.table import KINDS
from grasp_lora.training.trainer import Diverged
from grasp_lora.workbench.context import open_context
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, start, write_job, write_rows

TUNED = {"epochs": 3, "learning_rate": 1e-2, "batch_size": 4}
LONG = {"train": 8, "dev": 6, "micro_dev": 6, "test": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("auto")
    tiny_backbone_folder(folder / "base")
    for seed, role in enumerate(("source", "target")):
        tiny_adapter_folder(folder / role, tiny_model(), r=4, seed=seed)
    return folder


def config_of(place: Path, out: Path, **changes) -> RunConfig:
    """Return a choice between two given adapters; `rows` are those of the target."""
    rows = changes.pop("rows", LONG)
    values = {"recipe": "auto", "output": str(out), "finetune": TUNED} | changes
    values.setdefault("adapters", {role: str(place / role) for role in ("source", "target")})
    made = job(place, **values)
    made["data"]["target"]["rows"] = rows
    if made["adapters"]:
        del made["data"]["source"]
    return RunConfig.model_validate(made)


@pytest.fixture(scope="module")
def whole(place):
    """A finished run, with all systems scored; tests that change it take a copy."""
    evaluate = {"max_new_tokens": 2}
    return run(config_of(place, place / "whole", adapters={}, evaluate=evaluate), quiet=True)


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def trainings(monkeypatch):
    """The titles of the trainings after a merge that are begun."""
    begun: list[str] = []

    def counted(context, live, options, checkpoints):
        begun.append(options.title)
        return fit(context, live, options, checkpoints)

    fit = prune.fit
    monkeypatch.setattr(prune, "fit", counted)
    return begun


def killed_after(monkeypatch, config: RunConfig, name: str) -> None:
    """Run until a stage whose name begins so is published."""
    publish = executor.publish

    def last(out, key, facts):
        publish(out, key, facts)
        if str(out.relative_to(config.output)).startswith(name):
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(executor, "publish", last)
        with pytest.raises(Killed):
            run(config, quiet=True)


def decides(monkeypatch, *finalists: Finalist) -> None:
    """Let the choice ship these, whatever was measured."""
    made = Decision(finalists, "target", None, None, "As the test says.")
    monkeypatch.setattr(auto, "decide", lambda *_: made)


def first_trial(out: Path) -> dict:
    return read_json(out / "recipe.json")["tried"][0]


def whole_of(recipe: str, step: float, epochs: int) -> Finalist:
    return Finalist(Recipe(recipe, step, rows="labelled"), epochs, (1.0, 1.0))


SOURCE, AVERAGE = whole_of("source", 3.0, 1), whole_of("average", 1.0, 2)
NEW = Finalist(BESIDE, 2, ())


def weights(out: Path) -> bytes:
    return (out / "final" / "adapter_model.safetensors").read_bytes()


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Return module -> B A times the scaling, from the files of a PEFT adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    about = read_json(folder / "adapter_config.json")
    assert not about.get("use_rslora")
    found: dict[str, torch.Tensor] = {}
    for key, a in tensors.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            r = about["rank_pattern"].get(name, about["r"])
            alpha = about["alpha_pattern"].get(name, about["lora_alpha"])
            found[name] = tensors[key.replace("lora_A", "lora_B")] @ a * (alpha / r)
    return found


def test_the_folder_holds_the_adapter_the_choice_and_no_leftovers(whole):
    for name in (
        "recipe.json",
        "ratio.json",
        "scores.json",
        "data.json",
        "done.json",
        "report.html",
    ):
        assert (whole / name).stat().st_size > 0, name
    assert not [p.name for p in whole.rglob("*") if p.suffix in (".work", ".lock", ".old")]
    choice, scores = read_json(whole / "recipe.json"), read_json(whole / "scores.json")
    assert choice["price"]["budget"] == 5
    assert [one["slug"] for one in scores["systems"]] == [
        *("backbone", "source", "target", "average"),
        "final",
    ]
    assert scores["systems"][-1]["name"] == f"final: {choice['ships']}"
    for one in (*choice["tried"], *choice["simple_systems"]):
        assert (whole / one["path"] / "stage.json").exists(), one["path"]
    simple = [one["path"] for one in choice["simple_systems"]]
    assert simple == [f"evaluations/{one['slug']}" for one in scores["systems"][:-1]]
    for one in choice["tried"]:
        assert one["dev_loss"] == min(one["curve"]) == one["curve"][one["epochs"]]
    prices = [one["plain_runs"] for one in (*choice["tried"], *choice["simple_systems"])]
    assert all(price > 0 for price in prices[: len(choice["tried"])])
    assert sum(prices) < choice["price"]["plain_runs"], "the retraining is not among them"
    assert read_json(whole / "ratio.json")["verdict"] in ("flat", "learned")
    assert (whole / "starts" / "average" / "adapter_model.safetensors").exists()
    assert {one.name for one in (whole / "final").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors", "grasp_lora.json", "README.md"),
    }
    beside = {one.name for one in (whole / "shipped").iterdir()}
    assert {"stage.json", "merge.json", "parts.safetensors"} <= beside
    shipped = [one for one in choice["tried"] if one["shipped"]]
    assert len(shipped) == len(choice["finalists"]) > 0


def test_no_path_in_records_and_report_begins_with_the_run_folder(whole, place):
    systems = read_json(whole / "scores.json")["systems"]
    assert [one["path"] for one in systems] == [
        *("", "adapters/source", "adapters/target", "starts/average"),
        "final",
    ]
    files = [whole / name for name in ("report.md", "scores.json", "recipe.json", "ratio.json")]
    files += [*whole.rglob("provenance.json"), *whole.rglob("merge.json")]
    for file in files:
        lines = [
            line for line in file.read_text().splitlines() if '"output"' not in line
        ]  # provenance has the settings
        assert not [line for line in lines if str(whole) in line], file
    made = read_json(whole / "evaluations" / "source" / "provenance.json")
    assert made["adapter"] == "adapters/source"


def test_no_title_says_the_same_twice(place, tmp_path, trainings):
    out = run(config_of(place, tmp_path / "run"), quiet=True)
    shipped = read_json(out / "recipe.json")["finalists"]
    wholes = [title for title in trainings if title.endswith("all labels")]
    assert len(wholes) == len(shipped)
    assert all(title.count("all labels") == 1 for title in wholes)


def test_the_result_has_in_plain_peft_the_loss_that_was_evaluated(whole, place):
    base = AutoModelForCausalLM.from_pretrained(place / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(whole / "final")).eval()
    config = RunConfig.model_validate(read_json(whole / "config.json")["config"])
    rows = open_context(config, quiet=True).encoded("target", "test")
    losses: list[float] = []
    for row in rows:
        ids = torch.tensor(row.input_ids)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        told = torch.log_softmax(logits.double(), -1)[row.prompt_length - 1 : -1]
        answer = ids[0, row.prompt_length :]
        losses.append(-told.gather(1, answer[:, None]).mean().item())
    kept = read_jsonl(whole / "evaluations" / "final" / "predictions.jsonl")
    assert [one["loss"] for one in kept] == pytest.approx(losses, abs=1e-5)
    scores = read_json(whole / "scores.json")["systems"][-1]["sets"]["test"]["scores"]
    assert scores["loss"]["value"] == pytest.approx(fmean(losses), abs=1e-5)


def test_the_result_is_the_mean_of_the_finalists(place, tmp_path, monkeypatch):
    decides(monkeypatch, SOURCE, AVERAGE)
    out = run(config_of(place, tmp_path / "run"), quiet=True)
    choice = read_json(out / "recipe.json")
    assert [one["path"] for one in choice["finalists"]] == [
        "retrained/source-3x-1-epochs",
        "retrained/average-1x-2-epochs",
    ]
    assert choice["ships"].startswith(
        "mean of 2 on all 20 labels, unpruned: source adapter fine-tuned at 3e-2; "
    )
    parts = [deltas(out / one["path"]) for one in choice["finalists"]]
    final = deltas(out / "final")
    assert final.keys() == parts[0].keys()
    for name, found in final.items():
        wanted = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    for one, epochs in zip(choice["finalists"], (1, 2), strict=True):
        # 20 labelled rows by fours
        assert read_json(out / one["path"] / "stage.json")["steps"] == 5 * epochs


def test_a_new_adapter_beside_has_the_shape_of_the_target_adapter(place, tmp_path, monkeypatch):
    tiny_adapter_folder(tmp_path / "small", tiny_model(), r=2, alpha=6, targets=["k_proj"], seed=3)
    decides(monkeypatch, SOURCE, NEW)
    adapters = {"source": str(place / "source"), "target": str(tmp_path / "small")}
    out = run(config_of(place, tmp_path / "run", adapters=adapters), quiet=True)
    choice = read_json(out / "recipe.json")
    assert choice["ships"] == (
        "mean of 2 on all 20 labels, unpruned: source adapter fine-tuned at 3e-2; "
        "a new adapter trained at 3e-2"
    )
    source, new = (deltas(out / one["path"]) for one in choice["finalists"])
    about = read_json(out / choice["finalists"][1]["path"] / "adapter_config.json")
    assert (about["r"], about["lora_alpha"], about["rank_pattern"]) == (2, 6, {})
    assert new.keys() == deltas(tmp_path / "small").keys() != source.keys()
    assert all(delta.abs().max() > 0 for delta in new.values())
    final = deltas(out / "final")
    assert final.keys() == source.keys() | new.keys()
    for name, found in final.items():
        parts = [one[name] for one in (source, new) if name in one]
        torch.testing.assert_close(found, sum(parts) / 2, atol=1e-6, rtol=1e-5)
    facts = read_json(out / choice["finalists"][1]["path"] / "stage.json")
    assert (facts["rows_trained"], facts["steps"]) == (20, 10)  # by fours, two passes
    assert choice["finalists"][1]["dev_loss"] is None
    assert choice["dev_loss"] == choice["finalists"][0]["dev_loss"]


def test_where_only_the_new_adapter_does_not_diverge_a_simple_system_is_shipped(
    place, tmp_path, monkeypatch
):
    def fails(context, live, options, checkpoints):
        if options.title.endswith("all labels"):
            raise Diverged("the loss became NaN")
        return fit(context, live, options, checkpoints)

    fit = prune.fit
    monkeypatch.setattr(prune, "fit", fails)
    decide = auto.decide
    calls: list[Decision] = []

    def first_so(*args):
        made = decide(*args)
        calls.append(made)
        return replace(made, finalists=(SOURCE, NEW)) if len(calls) == 1 else made

    monkeypatch.setattr(auto, "decide", first_so)
    out = run(config_of(place, tmp_path / "run"), quiet=True)
    choice = read_json(out / "recipe.json")
    assert not choice["trained"]
    assert len(calls) == 2
    assert any("on all labels" in name for name in choice["not_applicable"])


def test_one_finalist_is_shipped_as_it_was_trained(place, tmp_path, monkeypatch):
    decides(monkeypatch, SOURCE)
    out = run(config_of(place, tmp_path / "run"), quiet=True)
    trained, final = deltas(out / "retrained" / "source-3x-1-epochs"), deltas(out / "final")
    for name, found in final.items():
        torch.testing.assert_close(found, trained[name], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("stage", ["trials/source", "trials/average", "retrained", "shipped"])
def test_a_killed_run_goes_on_from_what_is_done(place, tmp_path, monkeypatch, trainings, stage):
    undisturbed = run(config_of(place, tmp_path / "undisturbed"), quiet=True)
    once = [*trainings]
    trainings.clear()
    config = config_of(place, tmp_path / "killed")
    killed_after(monkeypatch, config, stage)
    out = run(config, quiet=True)
    assert trainings == once, "no training is begun twice"
    assert weights(out) == weights(undisturbed)
    for name in ("recipe.json", "ratio.json"):
        assert read_json(out / name) == read_json(undisturbed / name)


def test_a_run_killed_within_a_trial_ends_as_if_it_had_not_been(place, tmp_path):
    from plans.test_crash import kill_when

    finetune = TUNED | {"save_every": 1, "batch_size": 1}
    paths = {}
    for name in ("whole", "killed"):
        values = config_of(place, tmp_path / name, finetune=finetune).to_dict()
        paths[name] = write_job(tmp_path / f"{name}.json", values)
    work = tmp_path / "killed" / "trials"

    def reached() -> bool:
        return len(list(work.glob("source-*.work/checkpoint-*/grasp.json"))) >= 2

    kill_when(start("run", paths["killed"]), reached)
    assert not list(work.glob("source-*-epochs/stage.json")), "the kill came too late"
    done = {}
    for name, path in paths.items():
        done[name] = CliRunner().invoke(app, ["run", str(path)])
        assert done[name].exit_code == 0, done[name].output
    assert "resuming from checkpoint-" in done["killed"].output
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")


def test_an_interrupted_run_with_another_budget_keeps_its_trials(
    place, tmp_path, monkeypatch, trainings
):
    killed_after(monkeypatch, config_of(place, tmp_path / "run", budget=9), "trials/average")
    before = [*trainings]
    out = run(config_of(place, tmp_path / "run", budget=30), quiet=True)
    assert not set(trainings[len(before) :]) & set(before)
    fresh = run(config_of(place, tmp_path / "fresh", budget=30), quiet=True)
    assert weights(out) == weights(fresh)
    assert read_json(out / "recipe.json") == read_json(fresh / "recipe.json")


def test_a_longer_trial_shows_what_a_shorter_one_would(place, tmp_path, trainings):
    tried = {}
    for epochs in (4, 2):
        config = config_of(place, tmp_path / "run", finetune=TUNED | {"epochs": epochs}, budget=60)
        overwrite = (tmp_path / "run").exists()
        tried[epochs] = first_trial(run(config, overwrite=overwrite, quiet=True))
    config = config_of(place, tmp_path / "fresh", finetune=TUNED | {"epochs": 2}, budget=60)
    fresh = first_trial(run(config, quiet=True))
    assert tried[2]["curve"] == fresh["curve"] == tried[4]["curve"][:3]
    same = tried[4]["epochs"] <= 2
    assert (tried[2]["path"] == tried[4]["path"]) == same


def test_a_finished_run_is_left_as_it_is_unless_it_is_to_choose_anew(
    place, tmp_path, monkeypatch, trainings
):
    decides(monkeypatch, SOURCE)
    settings = partial(config_of, place, tmp_path / "run")
    out = run(settings(), quiet=True)
    before, count, done = weights(out), len(trainings), read_json(out / "done.json")
    times = (out / "done.json").stat().st_mtime_ns
    run(settings(report_to=()), quiet=True)
    assert (read_json(out / "done.json"), (out / "done.json").stat().st_mtime_ns) == (done, times)
    assert len(trainings) == count
    run(settings(budget=6, prefer="simple"), quiet=True)
    assert read_json(out / "recipe.json")["price"]["budget"] == 6
    assert weights(out) == before
    assert len(trainings) <= count + 2, "at most trials of another length, none of them twice"
    times = (out / "done.json").stat().st_mtime_ns
    run(settings(budget=6, prefer="simple"), quiet=True)
    assert (out / "done.json").stat().st_mtime_ns == times


def test_another_result_is_refused_before_it_is_trained_and_replaced_if_asked(
    place, tmp_path, monkeypatch, trainings
):
    decides(monkeypatch, SOURCE)
    settings = partial(config_of, place, tmp_path / "run")
    out = run(settings(), quiet=True)
    kept = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "timing.json"}
    trainings.clear()
    decides(monkeypatch, AVERAGE)
    with pytest.raises(ValueError, match=r"run/final' would be another result: made_of was"):
        run(settings(prefer="simple"), quiet=True)
    assert trainings == [], "nothing is trained for a result that may not be written"
    now = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != "timing.json"}
    assert now == kept, "the folder still is that of the finished run"
    run(settings(prefer="simple"), overwrite=True, quiet=True)
    assert [title.rpartition(", ")[2] for title in trainings] == ["all labels"]
    (shipped,) = read_json(out / "recipe.json")["finalists"]
    assert shipped["recipe"] == "average-1x"
    trained = deltas(out / shipped["path"])
    for name, found in deltas(out / "final").items():
        torch.testing.assert_close(found, trained[name], atol=1e-7, rtol=1e-6)
    assert read_json(out / "config.json")["config"]["prefer"] == "simple"


@pytest.mark.parametrize(("first", "then"), [("small", "best"), ("best", "small")])
def test_another_rank_is_another_result(place, tmp_path, monkeypatch, first, then):
    decides(monkeypatch, SOURCE)
    settings = partial(config_of, place, tmp_path / "run", budget=9)
    out = run(settings(prefer=first), quiet=True)
    before = weights(out)
    with pytest.raises(ValueError, match="would be another result: made_of was"):
        run(settings(prefer=then), quiet=True)
    assert weights(out) == before
    run(settings(prefer=then), overwrite=True, quiet=True)
    fresh = run(config_of(place, tmp_path / "fresh", budget=9, prefer=then), quiet=True)
    assert weights(out) == weights(fresh)


def test_the_result_comes_in_fewer_bytes_too_if_asked(place, tmp_path, monkeypatch, capsys):
    decides(monkeypatch, SOURCE)
    settings = partial(config_of, place, tmp_path / "run")
    out = run(settings(budget_mb=0.0006), quiet=True)
    before, small = weights(out), (out / "small" / "quantized.safetensors").read_bytes()
    about = read_json(out / "small" / "shrink.json")
    assert about["bytes"] <= 600 < about["bf16"]["bytes"]
    slugs = [one["slug"] for one in read_json(out / "scores.json")["systems"]]
    assert slugs == ["small", "final"]
    with pytest.raises(ValueError, match="run/small' would be another result: budget_mb was"):
        run(settings(budget_mb=0.0004), quiet=True)
    assert (out / "small" / "quantized.safetensors").read_bytes() == small
    run(settings(budget_mb=0.0004), overwrite=True, quiet=True)
    assert read_json(out / "small" / "shrink.json")["bytes"] <= 400
    shutil.rmtree(out / "small")
    run(settings(budget_mb=0.0004), quiet=True)
    assert read_json(out / "small" / "shrink.json")["bytes"] <= 400, "it is made again"
    run(settings(budget=6))
    assert "is not asked for any more" in " ".join(capsys.readouterr().err.split())
    assert (out / "small.old" / "quantized.safetensors").is_file()
    assert not (out / "small").exists()
    assert weights(out) == before


def test_overwriting_with_nothing_changed_does_everything_again(place, tmp_path, trainings):
    out = run(config_of(place, tmp_path / "run"), quiet=True)
    first, before = [*trainings], weights(out)
    run(config_of(place, tmp_path / "run"), overwrite=True, quiet=True)
    assert trainings == first * 2
    assert weights(out) == before


def test_two_seeds_differ(place, tmp_path):
    changes = {"evaluate": {"max_new_tokens": 2, "baselines": False}}
    one, two = (
        run(config_of(place, tmp_path / f"seed-{seed}", seed=seed, **changes), quiet=True)
        for seed in (1, 2)
    )
    assert weights(one) != weights(two)
    curves = [first_trial(out)["curve"] for out in (one, two)]
    assert curves[0][1:] != curves[1][1:]


def rows_of_my_own(place: Path, tmp_path: Path) -> dict:
    """Return data whose solved examples fit into the prompt of the tiny model."""
    parts = {"train": range(9), "dev": range(20, 26), "micro_dev": range(30, 36)}
    files = {
        part: str(write_rows(tmp_path / f"{part}.jsonl", numbers, part))
        for part, numbers in (*parts.items(), ("test", range(40, 43)))
    }
    prompt = "{context} {question}\n"
    target = {"language": "es", "files": files, "prompt": prompt}
    return {"max_length": 256, "target": target}


def test_the_tokens_that_are_told_were_read(place, tmp_path, monkeypatch):
    values = config_of(place, tmp_path / "run", finetune=TUNED | {"epochs": 3}).to_dict()
    read: dict[str, int] = {}
    stage: list[str] = [""]
    values["data"] = rows_of_my_own(place, tmp_path)
    config = RunConfig.model_validate(values)

    def opened(*given, **named):
        context = open_context(*given, **named)

        def count(_model, _inputs, named):
            ids, mask = named["input_ids"], named.get("attention_mask")
            tokens = ids.numel() if mask is None else int(mask[:, -ids.shape[1] :].sum())
            read[stage[0]] = read.get(stage[0], 0) + tokens

        context.backbone.model.register_forward_pre_hook(count, with_kwargs=True)
        return context

    def noted(one, *given):
        stage[0] = one.name
        return do(one, *given)

    do = executor.do
    monkeypatch.setattr(session, "open_context", opened)
    monkeypatch.setattr(executor, "do", noted)
    out = run(config, quiet=True)
    choice = read_json(out / "recipe.json")
    assert choice["not_applicable"] == {}
    paid = sum(count for name, count in read.items() if not name.startswith("evaluations/"))
    assert choice["price"]["tokens"] == pytest.approx(paid, rel=0.1), read
    plain = choice["price"]["tokens"] / choice["price"]["plain_runs"]
    assert paid <= 1.1 * choice["price"]["budget"] * plain


def diverge(monkeypatch, meant: Callable[[str], bool]) -> None:
    """Let the trainings whose titles are meant diverge in the first step of the second epoch."""
    fit = prune.fit

    def diverging(context, live, options, checkpoints):
        if meant(options.title):
            raise Diverged("in /some/where: lost", "step 3: lost", 3)
        return fit(context, live, options, checkpoints)

    monkeypatch.setattr(prune, "fit", diverging)


def told(out: Path) -> str:
    """Return what the console says of a finished run."""
    choice, ratio = read_json(out / "recipe.json"), read_json(out / "ratio.json")
    return "\n".join([*ship_parts(choice, "final"), *tried_lines(choice, ratio)])


def test_what_cannot_run_here_is_named_and_leaves_nothing_behind(place, tmp_path, capsys):
    out = run(config_of(place, tmp_path / "run"))
    name = "few-shot, 4 examples in the prompt"
    found = read_json(out / "recipe.json")["not_applicable"]
    assert found[name].startswith("n/a: not even one solved example")
    said = " ".join("".join(capsys.readouterr()).split())
    for text in ((out / "report.md").read_text(), told(out), said):
        assert f"{name}: n/a: not even one solved example" in text
    assert not [p.name for p in out.rglob("*") if p.suffix in (".work", ".lock", ".old")]
    assert not list((out / "evaluations").glob("few-shot*"))


def with_many_positions(base: Path, into: Path) -> Path:
    longer = shutil.copytree(base, into)
    settings = read_json(longer / "config.json")
    write_json(longer / "config.json", settings | {"max_position_embeddings": 8192})
    return longer


@pytest.mark.parametrize("shots", [4, 8])
def test_a_prompt_with_solved_examples_can_be_shipped(place, tmp_path, monkeypatch, shots):
    decides(monkeypatch, Finalist(Recipe("backbone", None, shots=shots), 0, (1.0, 1.0)))
    longer = with_many_positions(place / "base", tmp_path / "base")
    evaluate = {"max_new_tokens": 2}
    config = config_of(place, tmp_path / "run", model={"name": str(longer)}, evaluate=evaluate)
    out = run(config, quiet=True)
    name = f"few-shot, {shots} examples in the prompt"
    assert read_json(out / "recipe.json")["ships"] == name
    scored = {one["slug"]: one for one in read_json(out / "scores.json")["systems"]}
    assert scored["final"]["name"] == f"final: {name}"
    again = scored.get(f"few-shot-{shots}", scored["final"])
    assert scored["final"]["sets"] == again["sets"], "the same prompt, as a simple system"
    assert read_json(out / "final" / "prompt.json")["prompt"]


def test_of_the_prompts_both_are_measured_and_the_better_one_is_scored(place, tmp_path):
    longer = with_many_positions(place / "base", tmp_path / "base")
    evaluate = {"max_new_tokens": 2}
    config = config_of(place, tmp_path / "run", model={"name": str(longer)}, evaluate=evaluate)
    out = run(config, quiet=True)
    losses = {
        count: [x for split in ("dev", "micro_dev") for x in read_json(folder)[split]]
        for count in (4, 8)
        for folder in [out / "trials" / f"few-shot-{count}" / "losses.json"]
    }
    better = min(losses, key=lambda count: fmean(losses[count]))
    assert [one.name for one in (out / "evaluations").glob("few-shot*")] == [f"few-shot-{better}"]
    named = {one["name"]: one for one in read_json(out / "recipe.json")["simple_systems"]}
    for count, rows in losses.items():
        found = named[f"few-shot, {count} examples in the prompt"]
        assert found["dev_loss"] == pytest.approx(fmean(rows))
        place_of = "evaluations" if count == better else "trials"
        assert found["path"] == f"{place_of}/few-shot-{count}"


def test_a_trial_that_diverges_is_named_and_paid_for(place, tmp_path, monkeypatch):
    diverge(monkeypatch, lambda title: title.startswith("source adapter"))
    out = run(config_of(place, tmp_path / "run"), quiet=True)
    choice = read_json(out / "recipe.json")
    (lost, *_), says = choice["tried"], "source adapter fine-tuned at 3e-2"
    assert (lost["says"], lost["refused"]) == (says, "n/a: step 3: lost")
    assert lost["dev_loss"] is lost["path"] is None
    # 8 train rows by fours: the third step is of the second epoch
    assert [loss is None for loss in lost["curve"]] == [False, True, True]
    assert not lost["shipped"]
    assert f"{says}: n/a: step 3: lost" in told(out)
    assert f"{says}: n/a: step 3: lost" in (out / "report.md").read_text()
    measured = {one["name"]: one for one in choice["simple_systems"]}
    assert measured["source adapter"]["path"] == "trials/source"
    assert measured["source adapter"]["dev_loss"] == pytest.approx(lost["curve"][0])
    assert not [p.name for p in out.rglob("*") if p.suffix in (".work", ".lock", ".old")]
    assert "source" not in {one["recipe"].split("-")[0] for one in choice["finalists"]}


def test_a_training_that_really_diverges_does_not_end_the_run(place, tmp_path):
    finetune = TUNED | {"learning_rate": 1e30}
    out = run(config_of(place, tmp_path / "run", finetune=finetune), quiet=True)
    choice = read_json(out / "recipe.json")
    assert choice["tried"]
    assert all(one["refused"].startswith("n/a: ") for one in choice["tried"])
    simple = {one["name"]: one["dev_loss"] for one in choice["simple_systems"]}
    assert {"source adapter", "average of the adapters, untrained"} < set(simple)
    best = min(simple, key=simple.__getitem__)
    assert (choice["ships"], choice["trained"]) == (best, False)
    assert choice["dev_loss"] == simple[best]
    assert (out / "done.json").exists()
    assert not [p.name for p in out.rglob("*") if p.suffix in (".work", ".lock", ".old")]


def test_a_finalist_that_diverges_on_all_labels_is_left_out(place, tmp_path, monkeypatch):
    decides(monkeypatch, SOURCE, AVERAGE)
    lost = "source adapter fine-tuned at 3e-2, all labels"
    diverge(monkeypatch, lambda title: title == lost)
    out = run(config_of(place, tmp_path / "run"), quiet=True)
    choice = read_json(out / "recipe.json")
    assert [one["recipe"] for one in choice["finalists"]] == ["average-1x"]
    assert choice["not_applicable"]["source adapter fine-tuned at 3e-2, on all labels"] == (
        "n/a: step 3: lost"
    )
    assert choice["why"] == "As the test says. 1 that diverged on all labels left out."
    trained = deltas(out / "retrained" / "average-1x-2-epochs")
    for name, found in deltas(out / "final").items():
        torch.testing.assert_close(found, trained[name], atol=1e-7, rtol=1e-6)


def test_where_all_finalists_diverge_the_best_simple_system_is_shipped(
    place, tmp_path, monkeypatch
):
    diverge(monkeypatch, lambda title: title.endswith(", all labels"))
    out = run(config_of(place, tmp_path / "run"), quiet=True)
    choice = read_json(out / "recipe.json")
    simple = {one["name"]: one["dev_loss"] for one in choice["simple_systems"]}
    assert choice["ships"] == min(simple, key=simple.__getitem__)
    assert (out / "shipped" / "stage.json").exists()


def test_adapters_that_cannot_be_merged_leave_the_other_ways(place, tmp_path, monkeypatch):
    merge = KINDS["merge"]

    def refusing(work):
        if work.stage.option("rule") is None:
            raise NotApplicable("they cannot be merged")
        return merge.run(work)

    patched = dict(KINDS) | {"merge": replace(merge, run=refusing)}
    monkeypatch.setattr(executor, "KINDS", patched)
    out = run(config_of(place, tmp_path / "run"), quiet=True)
    choice = read_json(out / "recipe.json")
    assert choice["not_applicable"]["average of the adapters, untrained"] == (
        "n/a: they cannot be merged"
    )
    assert (out / "final" / "adapter_model.safetensors").exists()
    assert not [p.name for p in out.rglob("*") if p.suffix in (".work", ".lock", ".old")]


def test_the_bare_backbone_can_be_shipped(place, tmp_path, monkeypatch):
    decides(monkeypatch, Finalist(Recipe("backbone", None), 0, (1.0, 1.0)))
    config = config_of(place, tmp_path / "run", budget_mb=0.0006)
    out = run(config, quiet=True)
    assert read_json(out / "final" / "prompt.json")["prompt"] == ""
    assert not (out / "small").exists(), "there is no adapter to make smaller"
    times = (out / "done.json").stat().st_mtime_ns
    run(config, quiet=True)
    assert (out / "done.json").stat().st_mtime_ns == times
    ratio = read_json(out / "ratio.json")
    assert (ratio["ratio"], ratio["verdict"]) == (0.0, "not-probed")
    assert read_json(out / "recipe.json")["ships"] == "zero-shot"
    assert (out / "report.md").read_text().startswith("# The adapter to ship")


TESTED = {"train": 8, "test": 4}


def test_without_rows_that_judge_the_source_adapter_is_trained_on_all_labels(
    place, tmp_path, capsys
):
    out = run(config_of(place, tmp_path / "run", rows=TESTED))
    choice, lost = read_json(out / "recipe.json"), "No dev or micro-dev rows, so nothing is chosen"
    assert choice["ships"] == "source adapter fine-tuned at 3e-2 on all 8 labels, unpruned"
    assert choice["tried"] == choice["simple_systems"] == []
    assert choice["dev_loss"] is choice["gain"] is choice["simple"] is None
    said = " ".join("".join(capsys.readouterr()).split())
    for text in (choice["why"], *choice["notes"][:1], told(out), said):
        assert lost in text
        assert "the gain is not estimated, and there is no verdict on the prune ratio" in text
    assert (out / "report.md").read_text().count(lost) == 1
    trained = read_json(out / "retrained" / "source-3x-2-epochs" / "stage.json")
    assert trained["steps"] == 2 * 2, "8 rows by fours, twice"
    assert trained["log"][0]["learning_rate"] == pytest.approx(3 * TUNED["learning_rate"])
    assert read_json(out / "ratio.json")["verdict"] == "not-probed"
    assert len(read_json(out / "scores.json")["systems"]) == 1
    assert choice["price"]["plain_runs"] == pytest.approx(2 / 3), "2 of 3 epochs of 8 rows"


@pytest.mark.parametrize("judge", ["dev", "micro_dev"])
def test_one_part_that_judges_is_enough(place, tmp_path, judge):
    out = run(config_of(place, tmp_path / "run", rows=TESTED | {judge: 6}, budget=9), quiet=True)
    rows = read_json(out / first_trial(out)["path"] / "stage.json")["rows"]
    assert {len(one) for one in rows} == {6}
    assert read_json(out / "ratio.json")["verdict"] in ("flat", "learned")


def test_too_few_rows_to_judge_ratios_by_are_no_reason_to_stop(place, tmp_path):
    rows = TESTED | {"dev": 2, "micro_dev": 1}
    out = run(config_of(place, tmp_path / "run", rows=rows), quiet=True)
    assert read_json(out / "ratio.json")["verdict"] == "not-probed"
    assert read_json(out / "recipe.json")["tried"]


def test_without_test_rows_the_choice_is_the_same_and_nothing_is_scored(place, tmp_path, capsys):
    scored = run(config_of(place, tmp_path / "scored"), quiet=True)
    rows = {name: count for name, count in LONG.items() if name != "test"}
    capsys.readouterr()
    out = run(config_of(place, tmp_path / "run", rows=rows))
    said = "".join(capsys.readouterr())
    assert "nothing will be scored" in " ".join(said.split())
    assert read_json(out / "scores.json")["systems"] == []
    assert not (out / "evaluations").exists()
    assert "no test rows, so nothing was scored" in (out / "report.md").read_text()
    assert "no test rows, so nothing was scored" in told(out)
    assert (out / "final" / "adapter_model.safetensors").exists()
    ours, theirs = (read_json(one / "recipe.json") for one in (out, scored))
    assert [one["name"] for one in ours["simple_systems"]] == [
        one["name"] for one in theirs["simple_systems"]
    ]


def test_without_baselines_the_shipped_adapter_alone_is_scored(whole, place, tmp_path):
    evaluate = {"max_new_tokens": 2, "baselines": False}
    out = run(config_of(place, tmp_path / "run", adapters={}, evaluate=evaluate), quiet=True)
    assert [one["slug"] for one in read_json(out / "scores.json")["systems"]] == ["final"]
    assert [one.name for one in (out / "evaluations").iterdir()] == ["final"]
    ours, theirs = (read_json(one / "recipe.json") for one in (out, whole))
    for one, other in zip(ours["simple_systems"], theirs["simple_systems"], strict=True):
        assert one["name"] == other["name"]
        assert one["dev_loss"] == pytest.approx(other["dev_loss"], abs=1e-5)
    assert weights(out) == weights(whole), "what is scored changes no choice"


@pytest.mark.parametrize("rows", [LONG, TESTED])
def test_a_budget_that_is_too_small_is_refused_before_any_work(place, tmp_path, rows):
    config = config_of(place, tmp_path / "run", rows=rows, budget=0.1)
    with pytest.raises(ValueError, match=r"budget: 0.1 plain runs is too small .* works here is "):
        run(config, quiet=True)
    assert not (tmp_path / "run").exists()
    path = write_job(tmp_path / "job.json", config.to_dict())
    done = CliRunner().invoke(app, ["plan", str(path)])
    assert done.exit_code == 2
    least = done.output.split("works here is ")[1].strip()
    values = config.to_dict() | {"budget": float(least)}
    path = write_job(tmp_path / "job.json", values)
    assert CliRunner().invoke(app, ["plan", str(path)]).exit_code == 0
    out = run(load_config(path), quiet=True)
    price = read_json(out / "recipe.json")["price"]
    assert price["plain_runs"] <= 1.1 * price["budget"]


def test_settings_that_the_choice_makes_itself_are_refused_before_any_work(place, tmp_path):
    config = config_of(place, tmp_path / "run", merge={"when": "after"})
    said = "recipe: auto chooses merge.when itself; leave it out, or set recipe: grasp"
    with pytest.raises(ConfigError, match=said):
        run(config, quiet=True)
    path = write_job(tmp_path / "job.json", config.to_dict())
    done = CliRunner().invoke(app, ["plan", str(path)])
    assert done.exit_code == 2
    assert said in done.output
    assert not (tmp_path / "run").exists()


def test_a_plan_shows_the_first_round_and_what_else_may_be_spent(place, tmp_path):
    config = config_of(place, tmp_path / "run")
    path = write_job(tmp_path / "job.json", config.to_dict())
    shown = CliRunner().invoke(app, ["plan", str(path)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert not (tmp_path / "run").exists(), "nothing is written"
    line = " ".join(shown.output.split()).partition("budget: ")[2]
    assert line.startswith("5 plain runs (")
    assert "a plain run fine-tunes an adapter as configured, 3 epochs of 8 rows (" in line
    assert "reserved: " in line
    done = CliRunner().invoke(app, ["run", str(path)], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert line in " ".join(done.output.split()), "the run says the same"
    for one in read_json(tmp_path / "run" / "recipe.json")["tried"][:2]:
        assert one["path"] in shown.output
    again = CliRunner().invoke(app, ["plan", str(path)], env={"COLUMNS": "200"})
    assert "done" in again.output


def test_the_published_recipe_in_the_folder_of_a_choice_leaves_no_trace_of_it(place, tmp_path):
    out = run(config_of(place, tmp_path / "run"), quiet=True)
    changes = {"recipe": "grasp", "controller": {"rounds": 2, "rows": 4}}
    values = config_of(place, tmp_path / "run").to_dict() | changes
    grasp = RunConfig.model_validate(values)
    with pytest.raises(ValueError, match="--overwrite"):
        run(grasp, quiet=True)
    run(grasp, overwrite=True, quiet=True)
    assert not (out / "recipe.json").exists()
    assert (out / "report.md").read_text().startswith("# Prune ratio and scores")
    with pytest.raises(ValueError, match="would be another result"):
        run(config_of(place, tmp_path / "run"), quiet=True)
    run(config_of(place, tmp_path / "run"), overwrite=True, quiet=True)
    assert not (out / "ratio.png").exists()
    assert json.loads((out / "recipe.json").read_text())["tried"]


def test_what_was_damaged_in_a_finished_choice_is_made_again(whole, place, tmp_path, capsys):
    evaluate = {"max_new_tokens": 2}
    config = config_of(place, tmp_path / "run", adapters={}, evaluate=evaluate)
    shutil.copytree(whole, config.output)
    marker = config.output / "done.json"
    finished = marker.read_bytes()
    run(config, quiet=True)
    assert marker.read_bytes() == finished
    trial = config.output / first_trial(whole)["path"]
    (trial / "adapter_model.safetensors").write_bytes(b"")
    (config.output / "recipe.json").write_text("{}")
    run(config)
    said = "".join(capsys.readouterr().err.split())  # a long path is broken anywhere
    assert "isdamaged:'adapter_model.safetensors'has0bytes" in said
    assert "recipe.json'has2bytes,not" in said
    assert weights(config.output) == weights(whole)
    assert read_json(config.output / "recipe.json") == read_json(whole / "recipe.json")
    assert (trial / "adapter_model.safetensors").stat().st_size > 0
    times = marker.stat().st_mtime_ns
    run(config, quiet=True)
    assert marker.stat().st_mtime_ns == times
