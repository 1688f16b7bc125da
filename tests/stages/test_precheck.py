"""The precheck: what it measures, what it advises, and what it leaves alone."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.files import read_json
from grasp_lora.cli import app
from grasp_lora.config.run_config import load_config
from grasp_lora.core.lora import merge
from grasp_lora.models.example_losses import example_losses
from grasp_lora.plans.executor import work_off
from grasp_lora.plans.plan import PlanBuilder
from grasp_lora.plans.precheck import conclusion, precheck
from grasp_lora.plans.run import run
from grasp_lora.plans.session import Session
from grasp_lora.report.run import precheck_table
from grasp_lora.stages import probe
from grasp_lora.stages.stage import Stage
from grasp_lora.training.live import attach_live_adapter
from grasp_lora.workbench.context import Context, open_context
from grasp_lora.workbench.merge_probes import MERGE, UNTRAINED_MERGES, Probed
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_job

USUAL = (0.5, 0.5)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Return (configuration, its file, folder); the adapters are random and differ in rank."""
    folder = tmp_path_factory.mktemp("precheck")
    tiny_backbone_folder(folder / "base")
    adapters = {
        "source": str(tiny_adapter_folder(folder / "source", tiny_model(), r=4, seed=1)),
        "target": str(tiny_adapter_folder(folder / "target", tiny_model(), r=2, seed=2)),
    }
    file = write_job(folder / "run.yaml", job(folder, adapters=adapters))
    return load_config(file), file, folder


def test_there_are_24_probes_and_the_merge_is_one():
    assert len(UNTRAINED_MERGES) == 24
    assert [name for name, v in UNTRAINED_MERGES.items() if v.group == "merge"] == [MERGE]


def test_every_variant_has_the_loss_of_the_adapter_it_stands_for(given):
    config, _, folder = given
    context = open_context(config, quiet=True)
    before = {n: p.clone() for n, p in context.backbone.model.named_parameters()}
    found = precheck(config, rows=6, context=context)
    for name, param in context.backbone.model.named_parameters():
        assert torch.equal(param, before[name]), "the backbone is left as it was"

    pool = context.rows("target", ("micro_dev", "dev"))
    ids = [e.id for e in pool.encoded]
    drawn = [ids.index(name) for name in found["rows"]]
    assert len(drawn) == 6
    batches = pool.batches(drawn)
    both = [read_adapter(folder / role).adapter for role in ("source", "target")]

    def losses(adapters, weights):
        live = attach_live_adapter(
            context.backbone.model, merge("cat", adapters, weights), "merged"
        )
        live.model.eval()
        try:
            return example_losses(live.model, batches, len(drawn))
        finally:
            live.model.unload()

    measured = {name: one["losses"] for name, one in found["variants"].items()}
    assert measured[MERGE] == pytest.approx(losses(both, USUAL))
    assert measured["weights 0.5 + 0.5"] == pytest.approx(measured[MERGE])
    assert measured["weights 0.75 + 0.25"] == pytest.approx(losses(both, (0.75, 0.25)))
    assert measured["source alone"] == pytest.approx(losses(both[:1], (1.0,)))
    assert measured["target alone"] == pytest.approx(losses(both[1:], (1.0,)))
    assert measured["merge x 0.5"] == pytest.approx(losses(both, (0.25, 0.25)))
    assert measured["weights 0.25 + 0.75, x 0.75"] == pytest.approx(losses(both, (0.1875, 0.5625)))
    assert measured["no adapter"] == pytest.approx(losses(both, (0.0, 0.0)))
    read = 24 * 6 + 2 * 2 * 6  # and two prompts of both adapters; the contexts are too few for more
    assert found["forwards"] == read
    assert found["share_of_run"] == pytest.approx(read / 2 / (8 * 4))


def losses_with(**gains):
    """Return losses of all variants: as the merge's, less a gain where one is named."""
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(16, generator=generator, dtype=torch.float64) + 2
    found = {}
    for name, variant in UNTRAINED_MERGES.items():
        gain = gains.get(name, gains.get(variant.group, 0.0))
        noise = 0.02 * torch.randn(16, generator=generator, dtype=torch.float64)
        found[name] = (base - gain + noise).tolist()
    return found


@pytest.mark.parametrize(
    ("gains", "advice", "said"),
    [
        ({}, "merge", "take the merge"),
        ({"source alone": 0.5}, "do-not-merge", "source alone is better than every merge"),
        ({"target alone": 0.5}, "do-not-merge", "target alone is better than every merge"),
        ({"no adapter": 0.5}, "do-not-merge", "train a new adapter instead of merging"),
        ({"pruned": 0.3}, "search", "a search is worth its cost"),
        ({"merge x 0.75": 0.3}, "reweight", "set merge.weights to [0.375, 0.375]"),
        (
            {"weights 0.75 + 0.25, x 0.75": 0.3},
            "reweight",
            "set merge.weights to [0.5625, 0.1875]",
        ),
        ({"source alone": 0.3, "pruned": 0.6}, "search", "a search is worth its cost"),
        ({"source alone": 0.6, "pruned": 0.3}, "do-not-merge", "fine-tune it instead"),
        # what shrinking does as well is no reason to search for a ratio
        ({"merge x 0.5": 0.5, "pruned": 0.5}, "reweight", "[0.25, 0.25]"),
    ],
)
def test_the_advice_follows_the_losses(gains, advice, said):
    found = conclusion(losses_with(**gains), USUAL)
    assert found["advice"] == advice
    assert said in found["why"]
    json.dumps(found)


@pytest.mark.parametrize(("recipe", "says"), [("auto", True), ("grasp", False)])
def test_what_a_run_chooses_itself_is_not_advised_as_a_setting(given, monkeypatch, recipe, says):
    config, _, _ = given
    ids = [str(i) for i in range(16)]
    measured = Probed(ids, ids, losses_with(**{"merge x 0.75": 0.3}))
    monkeypatch.setattr("grasp_lora.plans.precheck.measure", lambda *_: measured)
    context = open_context(config.model_copy(update={"recipe": recipe}), quiet=True)
    found = precheck(context.config, context=context)
    assert found["advice"] == "reweight"
    assert ("recipe: auto chooses weights and ratio itself" in found["why"]) == says


def test_a_merge_without_weights_is_refused_before_any_work(given, tmp_path):
    config, _, _ = given
    section = config.merge.model_copy(update={"kind": "layer-swap"})
    config = config.model_copy(update={"merge": section})
    with pytest.raises(ValueError, match="compares weights of the merge, but merge.kind 'layer-s"):
        precheck(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_of_one_context_count_once():
    losses = losses_with(pruned=0.3)
    assert conclusion(losses, USUAL)["advice"] == "search"
    two = [str(i // 8) for i in range(16)]
    found = conclusion(losses, USUAL, two)
    assert (found["advice"], found["evidence"]["search"]) == ("merge", None)
    six = [str(i // 3) for i in range(16)]
    assert conclusion(losses, USUAL, six)["evidence"]["search"]["groups"] == 4


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("gains", "advice"),
    [({}, "merge"), ({"pruned": 0.3}, "search"), ({"weights 0.25 + 0.75": 0.3}, "reweight")],
)
def test_a_variant_whose_loss_is_not_finite_is_out_and_named(gains, advice, bad):
    losses = losses_with(**gains)
    for name in ("merge x 0.25", "ratio 0.1", "source alone"):
        losses[name] = [bad, *losses[name][1:]]
    found = conclusion(losses, USUAL)
    assert found["advice"] == advice
    assert found["left_out"] == ["source alone", "merge x 0.25", "ratio 0.1"]
    assert found["best"] not in found["left_out"]
    assert "left out, as their loss is not finite: source alone, merge x 0.25" in found["why"]
    table = precheck_table({"rows": [""] * 16} | found)
    assert set(list(table.columns[0].cells)[-3:]) == set(found["left_out"])


@pytest.mark.parametrize(
    ("finite", "advice", "said"),
    [
        (lambda variant: variant.group != "merge", "reweight", "set merge.weights to ["),
        (lambda variant: variant.group in ("pruned", "single"), "search", "worth its cost"),
        (lambda variant: variant.group == "single", "do-not-merge", "fine-tune it instead"),
    ],
)
def test_a_merge_without_a_finite_loss_is_not_advised(finite, advice, said):
    losses = losses_with()
    for name, variant in UNTRAINED_MERGES.items():
        if not finite(variant):
            losses[name] = [NAN] * 16
    found = conclusion(losses, USUAL)
    assert found["advice"] == advice
    assert "the merge as configured has no finite loss" in found["why"]
    assert said in found["why"]


def test_where_nothing_has_a_finite_loss_there_is_one_error():
    losses = {name: [NAN] * 16 for name in UNTRAINED_MERGES}
    with pytest.raises(ValueError, match="none of the 24 untrained merges has a finite loss"):
        conclusion(losses, USUAL)


def test_the_command_prints_the_table_and_writes_where_it_is_told(given):
    _, file, folder = given
    done = CliRunner().invoke(
        app, ["precheck", str(file), "--rows", "4", "--out", str(folder / "check")]
    )
    assert done.exit_code == 0, done.output
    found = read_json(folder / "check" / "precheck.json")
    assert f"{found['advice']}: " in done.output
    assert "source alone, x 0.75" in done.output
    assert f"{24 * 4 + 2 * 2 * 4} forwards" in done.output
    assert "adapters.target, loss of 4 train answers: the prompt " in done.output


@pytest.mark.parametrize(
    ("changes", "rows", "said"),
    [
        ({}, "16", "set both (grasp-lora train makes one)"),
        ({"adapters": True}, "3", "needs at least 4 examples, got 3"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_any_work(given, tmp_path, changes, rows, said):
    _, _, folder = given
    values = job(folder)
    if changes:
        values["adapters"] = {role: str(folder / role) for role in ("source", "target")}
    file = write_job(tmp_path / "run.yaml", values)
    done = CliRunner().invoke(app, ["precheck", str(file), "--rows", rows])
    assert done.exit_code == 2
    assert said in done.output.replace("\n", " ")


def learned_weights(
    context: Context, adapters: tuple[Path, Path], out: Path, choice: str = "weights"
) -> tuple[float, ...]:
    """Return the weights that the probe stage learns."""
    inputs = dict(zip(("source", "target"), adapters, strict=True))
    plan = PlanBuilder()
    plan.add(Stage(out.name, "probe", context.config, inputs, {"choice": choice}))
    session = Session(context.config, context.data, context)
    work_off(plan.build(), out.parent, session)
    return tuple(read_json(out / "weights.json")["weights"])


def test_weights_to_be_learned_are_those_the_probes_show(given, monkeypatch):
    config, _, folder = given
    context = open_context(config, quiet=True)
    names = [name for name, v in UNTRAINED_MERGES.items() if v.group in ("merge", "weights")]
    asked = []

    def measured(gains):
        def measure(context, folders, which, rows):
            asked.append((tuple(which), rows))
            losses = losses_with(**gains)
            ids = [str(i) for i in range(16)]
            return Probed(ids, ids, {name: losses[name] for name in which})

        return measure

    adapters = folder / "source", folder / "target"
    monkeypatch.setattr(probe, "measure", measured({"weights 0.75 + 0.25, x 0.75": 0.4}))
    out = folder / "learned"
    assert learned_weights(context, adapters, out) == (0.5625, 0.1875)
    assert asked == [(tuple(names), 16)]
    found = read_json(out / "weights.json")
    assert found["variant"] == "weights 0.75 + 0.25, x 0.75"
    assert found["evidence"]["shown"] is True
    assert learned_weights(context, adapters, out) == (0.5625, 0.1875)
    assert len(asked) == 1, "a finished stage is read, not done again"

    monkeypatch.setattr(probe, "measure", measured({}))
    assert learned_weights(context, adapters, folder / "average") == USUAL
    assert read_json(folder / "average" / "weights.json")["evidence"]["shown"] is False


@pytest.mark.parametrize(
    ("choice", "bad", "weights"),
    [
        ("weights", ["merge x 0.25"], (0.375, 0.375)),
        ("weights", [MERGE], (0.375, 0.375)),
        ("shares", ["share 0.5", "share 0"], (0.625, 0.375)),
    ],
)
def test_weights_without_a_finite_loss_are_not_chosen_and_are_named(
    given, monkeypatch, choice, bad, weights
):
    config, _, folder = given
    context = open_context(config, quiet=True)
    said = []
    monkeypatch.setattr(context.reporter, "say", said.append)

    def measure(context, folders, which, rows):
        ids = [str(i) for i in range(16)]
        all_of_them = losses_with(**{"merge x 0.75": 0.05})
        level = {name: all_of_them.get(name, all_of_them["ratio 0.1"]) for name in which}
        return Probed(ids, ids, level | {name: [NAN] * 16 for name in bad})

    monkeypatch.setattr(probe, "measure", measure)
    out = folder / f"{choice}-{len(bad)}-{bad[0].replace(' ', '')}"
    assert learned_weights(context, (folder / "source", folder / "target"), out, choice) == weights
    assert set(read_json(out / "weights.json")["left_out"]) == set(bad)
    assert any("not finite" in line and bad[0] in line for line in said)


def test_a_run_merges_by_the_weights_it_learned(given):
    _, _, folder = given
    values = job(
        folder,
        adapters={role: str(folder / role) for role in ("source", "target")},
        merge={"weights": "auto"},
        output=str(folder / "auto"),
    )
    run(load_config(write_job(folder / "auto.yaml", values)), quiet=True)
    learned = read_json(folder / "auto" / "weights" / "weights.json")["weights"]
    assert read_json(folder / "auto" / "merged" / "merge.json")["weights"] == learned


def test_a_merge_alone_cannot_learn_its_weights(given, tmp_path):
    _, _, folder = given
    values = job(folder, merge={"weights": "auto"})
    file = write_job(tmp_path / "run.yaml", values)
    arguments = ("--adapter", str(folder / "source"), "--adapter", str(folder / "target"))
    done = CliRunner().invoke(app, ["merge", str(file), *arguments, "--out", str(tmp_path / "m")])
    assert done.exit_code == 2
    assert "auto is learned by a run" in done.output.replace("\n", " ")
