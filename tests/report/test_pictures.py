"""Test the pictures of a run."""

import random
import struct
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text

from grasp_lora.base.clock import PARTS
from grasp_lora.report.pictures import (
    PART_COLOURS,
    pareto_front,
    plot_choice,
    plot_comparison,
    plot_profile,
    plot_search,
)


def round_record(number: int, **changes: Any) -> dict[str, Any]:
    record = {
        "round": number,
        "step": 10 * (number + 1),
        "kind": "policy",
        "candidates": [0.2, 0.4, 0.6],
        "rewards": [-0.1, 0.2, 0.05],
        "baseline": 1.0,
        "losses": [1.1, 0.8, 0.95],
        "committed": True,
        "ratio_before": 0.1 * number,
        "ratio": 0.1 * (number + 1),
        "mask_ratio": 0.1 * (number + 1),
        "best": 0.4,
        "mu": 0.4,
        "sigma": 0.1,
    }
    return {**record, **changes}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, drawing: None) -> list[Figure]:
    """Collect the figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def line(figure: Figure, panel: int, label: str) -> list[tuple[float, float]]:
    (found,) = [x for x in figure.axes[panel].get_lines() if x.get_label() == label]
    return [(float(x), float(y)) for x, y in zip(*found.get_data(), strict=True)]


def test_the_picture_shows_the_ratio_the_rewards_and_the_losses(tmp_path, drawn):
    rounds = [round_record(0), round_record(1), round_record(2, committed=False, ratio=0.2)]
    log = [{"step": s, "loss": 2.0 - s / 40} for s in range(1, 41)]
    evaluations = [{"step": 0, "loss": 1.2}, {"step": 12, "loss": 0.9}]
    ratio = {"ratio": 0.345, "verdict": "learned"}
    plot_search(rounds, log, evaluations, ratio, tmp_path / "deep" / "ratio.png")
    (figure,) = drawn
    steps, ratios = zip(*line(figure, 0, "current ratio"), strict=True)
    assert steps == (0, 10, 20, 30, 40)
    assert ratios == pytest.approx((0.0, 0.1, 0.2, 0.2, 0.2))
    assert line(figure, 1, "best of the round") == [(10, 0.2), (20, 0.2), (30, 0.2)]
    assert line(figure, 1, "committed") == [(10, 0.2), (20, 0.2)]
    assert line(figure, 2, "probing examples, before each round") == [(10, 1), (20, 1), (30, 1)]
    assert line(figure, 2, "dev, final run (its own steps)") == [(0, 1.2), (12, 0.9)]
    assert len(line(figure, 2, "train, each step")) == 40
    assert "0.345" in figure.get_suptitle()
    assert "learned" in figure.get_suptitle()


def test_without_a_baseline_the_losses_are_those_of_the_lowest_ratio_tried(tmp_path, drawn):
    records = [
        round_record(0, baseline=None, candidates=[0.5, 0.1], losses=[0.7, 0.9], rewards=[0.2, 0]),
        round_record(
            1, baseline=None, candidates=[0.2, 0.3], losses=[None, 0.8], rewards=[None, 0]
        ),
        round_record(2, baseline=None, candidates=[0.2], losses=[None], rewards=[None]),
    ]
    plot_search(records, [], [], {"ratio": 0.4, "verdict": "flat"}, tmp_path / "a.png")
    label = "probing examples, lowest ratio of each round"
    assert line(drawn[0], 2, label) == [(10, 0.9), (20, 0.8)]


def test_a_mask_that_differs_from_the_ratio_has_its_own_line(tmp_path, drawn):
    ratio = {"ratio": 0.4, "verdict": "flat"}
    plot_search([round_record(0, mask_ratio=0.4)], [], [], ratio, tmp_path / "a.png")
    plot_search([round_record(0)], [], [], ratio, tmp_path / "b.png")
    labels = [[x.get_label() for x in f.axes[0].get_lines()] for f in drawn]
    assert "ratio of the mask in force" in labels[0]
    assert "ratio of the mask in force" not in labels[1]


@pytest.mark.parametrize(
    "rounds",
    [
        [],
        [round_record(0, rewards=[None] * 3, losses=[None] * 3, committed=False)],
        [round_record(0, rewards=[0.0, 0.0, 0.0])],
        [round_record(0, rewards=[None, 0.1, 0.2]), round_record(1, baseline=None)],
        [round_record(0, candidates=[0.3], rewards=[0.1], losses=[0.9])],
    ],
    ids=["no round", "all NaN", "flat", "one NaN", "one candidate"],
)
def test_any_search_can_be_drawn(tmp_path, rounds, drawing):
    path = tmp_path / "ratio.png"
    plot_search(rounds, [], [], {"ratio": 0.0, "verdict": "never-fired"}, path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert min(width, height) > 1000


def part_times(**parts: float) -> dict[str, dict[str, float]]:
    return {part: {"seconds": seconds, "calls": 1} for part, seconds in parts.items()}


def profile_of(**stages: dict[str, dict[str, float]]) -> dict[str, Any]:
    wall = sum(s["seconds"] for parts in stages.values() for s in parts.values())
    return {"wall_seconds": wall, "stages": stages, "parts": dict(PARTS)}


def test_a_profile_shows_the_parts_of_every_stage_end_to_end(tmp_path, drawn):
    stages = {
        "search": part_times(idle=2.0, step=10.0, probe=20.0),
        "merged": {},
        "final": part_times(step=8.0),
    }
    plot_profile(profile_of(**stages), tmp_path / "deep" / "profile.png")
    (figure,) = drawn
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["search", "final"]
    bars = {c.get_label(): [(b.get_x(), b.get_width()) for b in c] for c in axes.containers}
    assert bars == {
        "step 45.0 %": [(0, 10), (0, 8)],
        "probe 50.0 %": [(10, 20), (8, 0)],
        "idle 5.0 %": [(30, 2), (8, 0)],
    }
    assert [note.get_text() for note in axes.texts] == ["32.0 s, 80.0 %", "8.00 s, 20.0 %"]
    assert "40.0 s" in figure.get_suptitle()


def test_every_part_has_a_colour_of_its_own():
    assert list(PART_COLOURS) == list(PARTS)
    assert len(set(PART_COLOURS.values())) == len(PARTS)


def comparison(scores: dict[str, tuple[float, float]], metric: str) -> dict[str, Any]:
    """Return the rows of a comparison: method -> (seconds, score)."""
    return {
        "rows": [
            {
                "method": name,
                "ratio": 0.01 * place,
                "scores": {"test": {metric: score}},
                "intervals": {"test": {metric: (score - 0.1, score + 0.1)}},
                "seconds": seconds,
                "tokens": 5,
            }
            for place, (name, (seconds, score)) in enumerate(scores.items())
        ]
    }


def names_in(figure: Figure) -> list[Annotation]:
    return [text for text in figure.axes[0].texts if isinstance(text, Annotation)]


@pytest.mark.parametrize("metric", ["loss", "chrf"])
def test_of_60_methods_the_pareto_front_alone_has_names_and_they_do_not_overlap(
    tmp_path, drawn, metric
):
    sign = -1 if metric == "loss" else 1
    better = {f"grasp-{n}": (100.0 + n, 50 + sign * 0.001 * n) for n in range(12)}
    worse = {f"late-{n}": (100.5 + 3 * n, 50 - sign * (1 + 0.01 * n)) for n in range(48)}
    plot_comparison(comparison(worse | better, metric), tmp_path)
    pareto, ratios, cost = drawn
    for figure in (pareto, ratios):
        texts = names_in(figure)
        assert sorted(t.get_text() for t in texts) == sorted(better)
        figure.draw_without_rendering()
        boxes = [Text.get_window_extent(text) for text in texts]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
        assert len({text.xy for text in texts}) == len(better), "the points do not move"
    assert len(cost.axes[0].get_yticklabels()) == 60, "all names stand here"


@pytest.mark.parametrize("lower", [False, True])
def test_the_front_is_what_nothing_beats_in_cost_and_score(lower):
    generator = random.Random(0)
    means = {str(n): (generator.randrange(9), generator.randrange(9)) for n in range(60)}
    sign = -1 if lower else 1

    def beaten(one: tuple[int, int]) -> bool:
        return any(
            (c <= one[0] and sign * s >= sign * one[1]) and (c, s) != one for c, s in means.values()
        )

    front = pareto_front(means, lower)
    assert {means[name] for name in front} == {one for one in means.values() if not beaten(one)}
    assert [means[name][0] for name in front] == sorted({means[name][0] for name in front})


def test_the_picture_of_a_choice_leaves_out_losses_that_are_not_finite(tmp_path, drawn):
    def trial(name: str, curve: list[float | None], **changes: Any) -> dict[str, Any]:
        facts = {"says": name, "curve": curve, "epochs": 1, "dev_loss": curve[1], "refused": None}
        return {**facts, "shipped": False, **changes}

    choice = {
        "tried": [
            trial("one", [2.0, 1.5, None], shipped=True),
            trial("lost", [2.0, None], epochs=None, refused="n/a: diverged"),
        ],
        "simple": {"name": "b", "dev_loss": 1.9},
    }
    plot_choice(choice, tmp_path / "recipe.png")
    (figure,) = drawn
    assert line(figure, 0, "shipped: one") == [(0.0, 2.0), (1.0, 1.5)]
    assert [text.get_text() for text in figure.axes[0].texts] == ["best without training: b"]
    assert (tmp_path / "recipe.png").read_bytes().startswith(b"\x89PNG")
