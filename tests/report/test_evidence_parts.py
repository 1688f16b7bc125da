"""The parts of a report that show why."""

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from scipy import stats

from grasp_lora.base.files import read_jsonl, write_json, write_jsonl
from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.report.charts import Chart
from grasp_lora.report.document import Lines, Section, Table
from grasp_lora.report.evidence_parts import (
    answers_section,
    curves_section,
    ratio_section,
    tried_section,
    zeros_section,
)


def charts(section: Section) -> list[Chart]:
    return [part for part in section.parts if isinstance(part, Chart)]


def tables(section: Section) -> list[Table]:
    return [part for part in section.parts if isinstance(part, Table)]


def said(section: Section) -> str:
    return " ".join(
        text for part in section.parts if isinstance(part, Lines) for text in part.texts
    )


LOSSES = {"0.0": [1.0, 2.0, 4.0, 3.0], "0.4": [1.5, 2.25, 3.5, 3.5], "0.8": [1.0, None, 3.0, 2.0]}


def test_ratios_have_the_t_interval_of_their_difference_to_the_one_in_force(tmp_path):
    ratio = {"ratio": 0.0, "losses": LOSSES, "groups": list("abcd")}
    section = ratio_section(tmp_path, ratio, "outcome")
    (chart,) = charts(section)
    (series,) = chart.series
    gaps = [0.5, 0.25, -0.5, 0.5]
    low, high = stats.ttest_1samp(gaps, 0).confidence_interval(0.95)
    assert series.points == ((0.0, 0.0), (0.4, pytest.approx(statistics.fmean(gaps))))
    assert series.band[1] == (0.4, pytest.approx(low), pytest.approx(high))
    assert chart.marker == (0.0, "in force")
    (table,) = tables(section)
    assert [cell.text for cell in table.rows[0]] == ["0", "2.500", "+0.000", "[+0.000, +0.000]"]
    assert table.marked == (0,)


def test_losses_of_one_context_have_no_interval(tmp_path):
    ratio = {"ratio": 0.0, "losses": LOSSES, "groups": ["a"] * 4}
    (table,) = tables(ratio_section(tmp_path, ratio, ""))
    assert [(row[3].text, row[3].value) for row in table.rows] == [("–", None)] * 2


def round_record(number: int) -> dict[str, Any]:
    per_row = [[1.0, 1.4, 1.2], [0.9, 1.5, 1.1], [2.0, 2.5, 2.2]]
    return {
        **{"round": number, "step": 10 * number, "kind": "policy", "reason": "committed"},
        **{"candidates": [0.2, 0.4, 0.6], "rewards": [0.0, 0.0, -1.0], "baseline": None},
        **{"losses": [1.2, 1.17, 2.23], "committed": True, "ratio_before": 0.1, "ratio": 0.2},
        **{"mask_ratio": 0.2, "best": 0.4, "mu": 0.4, "sigma": 0.1, "baseline_rows": []},
        **{"rows": ["x", "y", "z"], "groups": ["x", "y", "z"], "per_row": per_row},
    }


def test_a_search_shows_the_curve_that_chose_the_ratio_zero_at_that_ratio(tmp_path):
    write_jsonl(tmp_path / "rounds.jsonl", [round_record(n) for n in range(3)])
    settings = vars(ControllerConfig()) | {"of_an_earlier_version": 1}
    write_json(tmp_path / "config.json", {"config": {"controller": settings}})
    (chart,) = charts(ratio_section(tmp_path, {"ratio": 0.2}, ""))
    points = {round(x, 3): y for x, y in chart.series[0].points}
    lows, highs = ({round(x, 3): end[n] for x, *end in chart.series[0].band} for n in (0, 1))
    assert points[0.2] == lows[0.2] == highs[0.2] == 0.0
    assert 0.3 < lows[0.6] <= points[0.6] <= highs[0.6]
    assert abs(points[0.4]) < 0.1


def trial(name: str, loss: float, price: float | None, **more: Any) -> dict[str, Any]:
    return {"name": name, "dev_loss": loss, "path": name, "plain_runs": price} | more


def test_what_was_tried_stands_against_its_price():
    tried = trial("t", 0.5, 1.25, says="trained", epochs=2, curve=[1], refused=None, shipped=True)
    choice = {"tried": [tried], "simple_systems": [trial("zero-shot", 2.0, 0.1)]}
    section = tried_section(choice, ["told"])
    (chart,) = charts(section)
    assert [(one.name, one.points) for one in chart.series] == [
        ("trained", ((1.25, 0.5),)),
        ("zero-shot", ((0.1, 2.0),)),
    ]
    (table,) = tables(section)
    assert [cell.text for cell in table.rows[0]] == ["trained", "0.500", "2", "1.25", "t"]
    old = {"tried": [], "simple_systems": [trial("a", 1.0, None), trial("b", 1.0, None)]}
    assert not charts(tried_section(old, []))


def test_curves_are_those_of_all_trainings_and_lost_losses_are_left_out(tmp_path):
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    stage = {"log": log, "evaluations": [{"step": 0, "loss": 3.0}, {"step": 3, "loss": 2.5}]}
    for name in ("final", "adapters/source", "trials/a"):
        write_json(tmp_path / name / "stage.json", stage)
    write_json(tmp_path / "merged" / "stage.json", {"kind": "merge"})
    dev, train = charts(curves_section(tmp_path))
    assert [one.name for one in train.series] == ["final", "trials/a", "adapters/source"]
    assert train.series[0].points == ((1, 2.0), (3, 1.0))
    assert [one.name for one in dev.series] == ["final", "trials/a"], "the source has other rows"
    assert dev.series[1].points == ((0, 3.0), (3, 2.5))


def test_zeros_are_counted_by_layer_and_module(tmp_path):
    half = torch.tensor([[0.0, 1.0], [0.0, 2.0]])
    place = "base_model.model.model.layers"
    tensors = {f"{place}.0.self_attn.q_proj.lora_A.weight": half}
    tensors |= {f"{place}.0.self_attn.q_proj.lora_B.weight": torch.ones(2, 2)}
    tensors |= {f"{place}.10.mlp.up_proj.lora_A.weight": torch.zeros(2, 2)}
    (tmp_path / "final").mkdir()
    save_file(tensors, tmp_path / "final" / "adapter_model.safetensors")
    section = zeros_section(tmp_path)
    (chart,) = charts(section)
    assert {one.name: one.points for one in chart.series} == {
        "q_proj": ((0, 25.0),),
        "up_proj": ((10, 100.0),),
    }
    assert said(section).startswith("50.0 % of the adapter's 12 entries are zero.")


def test_zeros_that_fill_a_module_up_are_not_counted(tmp_path):
    module = "model.layers.0.self_attn.q_proj"
    down, up = torch.zeros(3, 2), torch.zeros(2, 3)
    down[:2], up[:, :2] = torch.tensor([[0.0, 1.0], [2.0, 3.0]]), 1.0
    final = tmp_path / "final"
    final.mkdir()
    tensors = {f"base_model.model.{module}.lora_A.weight": down}
    tensors |= {f"base_model.model.{module}.lora_B.weight": up}
    save_file(tensors, final / "adapter_model.safetensors")
    (final / "grasp_lora.json").write_text(json.dumps({"ranks": {module: 2}}))
    assert said(zeros_section(tmp_path)).startswith("12.5 % of the adapter's 8 entries are zero.")


def answers(folder: Path, slug: str, texts: list[str], scores: list[float]) -> None:
    rows = [
        {"set": "test", "id": f"q{n}", "references": ["yes"], "prediction": text, "exact_match": s}
        for n, (text, s) in enumerate(zip(texts, scores, strict=True))
    ]
    write_jsonl(folder / "evaluations" / slug / "predictions.jsonl", rows)


def test_answers_that_differ_show_gains_and_losses_in_turn(tmp_path):
    answers(tmp_path, "final", ["yes", "no", "yes", "so", "yes"], [100, 0, 100, 0, 100])
    answers(tmp_path, "target", ["yes ", "yes", "no", "no", "nay"], [100, 100, 0, 0, 0])
    section = answers_section(tmp_path, "qa")
    assert said(section) == (
        "4 of 5 answers differ; by exact match the shipped adapter is better in 2, worse in 1."
    )
    (table,) = tables(section)
    assert [row[0].text for row in table.rows] == ["q2", "q1", "q4", "q3"]
    assert [cell.text for cell in table.rows[0]] == ["q2", "yes", "yes", "no"]
    assert all(cell.outside for row in table.rows for cell in row)


@pytest.mark.parametrize(("task", "title"), [("qa", "question"), ("summarization", "input")])
def test_answers_stand_beside_their_question_where_it_is_known(tmp_path, task, title):
    answers(tmp_path, "final", ["yes"], [100])
    answers(tmp_path, "target", ["no"], [0])
    file = tmp_path / "evaluations" / "final" / "predictions.jsonl"
    write_jsonl(file, [row | {"question": "¿Sí?"} for row in read_jsonl(file)])
    (table,) = tables(answers_section(tmp_path, task))
    assert table.titles == ("example", title, "accepted", "shipped", "target adapter alone")
    assert [cell.text for cell in table.rows[0]] == ["q0", "¿Sí?", "yes", "yes", "no"]


def test_a_long_answer_is_cut(tmp_path):
    answers(tmp_path, "final", ["a" * 1000], [0])
    answers(tmp_path, "target", ["b"], [0])
    (table,) = tables(answers_section(tmp_path, "qa"))
    assert table.rows[0][2].text == "a" * 600 + "… (400 more characters)"
