"""Findings of a run: read from the stages' folders, written into ratio.json once each."""

import pytest

from grasp_lora.base.files import read_json, write_json
from grasp_lora.core.controller.rounds import ControllerConfig, RatioChoice
from grasp_lora.report.run import finding_lines
from grasp_lora.stages.findings import add_run_findings, search_findings

ROWS = [2.0, 2.5, 1.5, 3.0, 2.2, 1.9]


def finished(folder, losses, step=13, ratio=0.4):
    best = {"step": step, "loss": sum(losses) / len(losses)}
    stage = {"ratio": ratio, "best": best, "best_rows": losses, "steps": 26}
    write_json(folder / "stage.json", stage)
    return folder


def better(by):
    return [loss - by - 0.01 * i for i, loss in enumerate(ROWS)]


def found_in(tmp_path, final, alone=()):
    write_json(tmp_path / "ratio.json", {"ratio": 0.4, "findings": []})
    add_run_findings(tmp_path, final, {name: tmp_path / name for name in alone})
    return {one["name"]: one for one in read_json(tmp_path / "ratio.json")["findings"]}


def test_nothing_is_found_where_the_result_is_as_good(tmp_path):
    final = finished(tmp_path / "final", ROWS)
    finished(tmp_path / "baselines" / "merged-finetuned", ROWS)
    finished(tmp_path / "target", [loss + 1 for loss in ROWS])
    assert found_in(tmp_path, final, ["target"]) == {}


def test_a_result_that_is_worse_than_what_is_simpler_says_so(tmp_path):
    final = finished(tmp_path / "final", ROWS, step=0)
    finished(tmp_path / "baselines" / "merged-finetuned", better(0.3))
    finished(tmp_path / "target", better(0.5))
    finished(tmp_path / "source", better(0.1))
    found = found_in(tmp_path, final, ["target", "source", "absent"])
    assert set(found) == {"overfitting", "over-pruned", "not-worth-merging"}
    assert found["not-worth-merging"]["evidence"]["better"] == "target"
    lines = finding_lines(read_json(tmp_path / "ratio.json"))
    assert [line.split(":")[0] for line in lines] == list(found)


@pytest.mark.parametrize(
    ("curve", "named"),
    [
        ([0.0, 0.2, 0.4], True),
        ([0.0, 0.4, 0.2], False),  # the last evaluation is not the best
        ([0.4, 0.0, 0.2], False),  # nor here, though it is falling
        ([0.2], False),
        ([], False),
    ],
)
def test_a_run_that_ends_while_it_gets_better_is_undertrained(tmp_path, curve, named):
    final = finished(tmp_path / "final", ROWS)
    folder = finished(tmp_path / "source", [loss + 1 for loss in ROWS])
    stage = read_json(folder / "stage.json")
    rows = [[loss + 1 - by - 0.01 * i for i, loss in enumerate(ROWS)] for by in curve]
    if len(rows) > 1:  # rows differ in what they gain, or no error could be told
        rows[-1] = [loss - 0.02 * (i % 2) for i, loss in enumerate(rows[-1])]
    write_json(folder / "stage.json", stage | {"rows": rows})
    found = found_in(tmp_path, final, ["source"])
    assert ("undertrained" in found) == named
    if named:
        one = found["undertrained"]
        assert one["evidence"]["runs"] == "source"
        assert one["evidence"]["loss_less"] == pytest.approx(0.21)
        assert "more epochs or a larger learning_rate in train.finetune" in one["says"]
        assert "train.target" not in one["says"]


def test_all_that_were_still_getting_better_are_named_the_steepest_first(tmp_path):
    final = finished(tmp_path / "final", ROWS)
    for name, by in (("source", 0.2), ("target", 0.5)):
        folder = finished(tmp_path / name, [loss + 1 for loss in ROWS])
        stage = read_json(folder / "stage.json")
        rows = [[loss + 1 for loss in ROWS], [loss + 1 for loss in better(by)]]
        write_json(folder / "stage.json", stage | {"rows": rows})
    (one,) = found_in(tmp_path, final, ["source", "target"]).values()
    assert one["evidence"]["runs"] == "target; source"
    assert "epoch: target; source (that of the target fell by 0.525 nats" in one["says"]


@pytest.mark.parametrize(("at", "named"), [(0, True), (1, False), (2, False)])
def test_an_evaluation_that_is_not_finite_is_none_to_be_better_than(tmp_path, at, named):
    final = finished(tmp_path / "final", ROWS)
    rows = [ROWS, [loss - 0.2 for loss in ROWS], better(0.4)]
    rows[at] = [float("nan"), *rows[at][1:]]
    stage = read_json(final / "stage.json")
    write_json(final / "stage.json", stage | {"rows": rows})
    assert ("undertrained" in found_in(tmp_path, final)) == named


def test_the_settings_of_a_run_are_named_only_where_it_was_still_falling(tmp_path):
    final = finished(tmp_path / "final", ROWS)
    folder = finished(tmp_path / "target", [loss + 1 for loss in ROWS])
    rows = [[loss + 1 for loss in ROWS], [loss + 1 for loss in better(0.5)]]
    write_json(folder / "stage.json", read_json(folder / "stage.json") | {"rows": rows})
    write_json(tmp_path / "ratio.json", {})
    add_run_findings(tmp_path, final, {"t": folder}, sections={"t": "train.target"})
    says = {one["name"]: one["says"] for one in read_json(tmp_path / "ratio.json")["findings"]}
    assert says["undertrained"].endswith("larger learning_rate in train.target")


def test_a_fall_that_may_be_chance_is_not_called_undertrained(tmp_path):
    final = finished(tmp_path / "final", ROWS)
    stage = read_json(final / "stage.json")
    noisy = [loss + (0.5 if i % 2 else -0.51) for i, loss in enumerate(ROWS)]
    write_json(final / "stage.json", stage | {"rows": [ROWS, noisy]})
    assert found_in(tmp_path, final) == {}


@pytest.mark.parametrize(("before", "named"), [(0, True), (13, False)])
def test_overfitting_is_what_no_step_of_search_and_final_run_improved(tmp_path, before, named):
    final = finished(tmp_path / "final", ROWS, step=0)
    finished(tmp_path / "search", ROWS, step=before)
    assert ("overfitting" in found_in(tmp_path, final)) == named


def test_an_unpruned_result_is_not_over_pruned(tmp_path):
    final = finished(tmp_path / "final", ROWS, ratio=0.0)
    finished(tmp_path / "baselines" / "merged-finetuned", better(0.3))
    assert found_in(tmp_path, final) == {}


def test_rows_of_two_contexts_are_two_pieces_of_evidence(tmp_path):
    final = finished(tmp_path / "final", ROWS)
    finished(tmp_path / "baselines" / "merged-finetuned", better(0.3))
    stage = read_json(final / "stage.json")
    assert set(found_in(tmp_path, final)) == {"over-pruned"}
    uneven = [loss - by for loss, by in zip(ROWS, [0.6] * 3 + [0.1] * 3, strict=True)]
    finished(tmp_path / "baselines" / "merged-finetuned", uneven)
    assert set(found_in(tmp_path, final)) == {"over-pruned"}, "without contexts rows are counted"
    write_json(final / "stage.json", stage | {"groups": list("aaabbb")})
    assert found_in(tmp_path, final) == {}
    write_json(final / "stage.json", stage | {"groups": list("abcdef")})
    found = found_in(tmp_path, final)["over-pruned"]["evidence"]
    assert (found["rows"], found["groups"]) == (6, 6)


def test_a_result_with_a_loss_that_is_not_finite_is_compared_with_nothing(tmp_path):
    final = finished(tmp_path / "final", [float("nan"), *ROWS[1:]])
    finished(tmp_path / "baselines" / "merged-finetuned", better(0.3))
    finished(tmp_path / "target", better(0.5))
    assert found_in(tmp_path, final, ["target"]) == {}


def test_losses_of_other_rows_are_left_out_and_known_findings_stay_once(tmp_path):
    final = finished(tmp_path / "final", ROWS, step=0)
    finished(tmp_path / "other", better(0.5)[:4])
    known = {"name": "at-bound", "says": "x", "evidence": {}}
    write_json(tmp_path / "ratio.json", {"ratio": 0.4, "findings": [known]})
    for _ in range(2):
        add_run_findings(tmp_path, final, {"other": tmp_path / "other"})
    names = [one["name"] for one in read_json(tmp_path / "ratio.json")["findings"]]
    assert names == ["at-bound", "overfitting"]


def test_a_search_without_rounds_is_named():
    choice = RatioChoice(0.0, "never-fired", None, None, None, "", None, None)
    found = search_findings(ControllerConfig(), choice, (), (), 100, 16, ["a"] * 66)
    assert [one["name"] for one in found] == ["never-fired"]


def test_empty_answers_are_counted_over_the_test_sets(tmp_path):
    final = finished(tmp_path / "final", ROWS)
    write_json(tmp_path / "ratio.json", {"ratio": 0.4, "findings": []})
    sets = {"test": {"n": 10, "empty": 1}, "news": {"n": 5, "empty": 2}, "older": {"n": 9}}
    systems = [{"name": "target adapter", "sets": sets}, {"name": "old", "sets": {"t": {"n": 1}}}]
    add_run_findings(tmp_path, final, {}, systems)
    (found,) = read_json(tmp_path / "ratio.json")["findings"]
    assert (found["name"], found["evidence"]["systems"]) == (
        "empty-answers",
        "target adapter 3 of 15",
    )
