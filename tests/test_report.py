"""Pictures and tables from records."""

import io
import struct
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from grasp_lora.report import (
    comparison,
    plot_search,
    scores_markdown,
    scores_table,
    write_report,
)
from grasp_lora.runs import write_json

SCORES: dict[str, Any] = {
    "task": "qa",
    "language": "ar",
    "seed": 42,
    "systems": [
        {
            "slug": "a",
            "name": "zero-shot",
            "exact_match": 3.25,
            "token_f1": 10.0,
            "loss": 2.7404,
            "n": 100,
        },
        {
            "slug": "b",
            "name": "a | b",
            "exact_match": 50,
            "token_f1": 61.26,
            "loss": None,
            "zeros": 0.4567,
        },
    ],
}


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
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
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
    assert line(figure, 2, "probing rows, before each round") == [(10, 1), (20, 1), (30, 1)]
    assert line(figure, 2, "dev, final run (its own steps)") == [(0, 1.2), (12, 0.9)]
    assert len(line(figure, 2, "train, each step")) == 40
    assert "0.345" in figure.get_suptitle()
    assert "learned" in figure.get_suptitle()


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
def test_any_search_can_be_drawn(tmp_path, rounds):
    path = tmp_path / "ratio.png"
    plot_search(rounds, [], [], {"ratio": 0.0, "verdict": "never-fired"}, path)
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert min(width, height) > 1000


def test_the_table_keeps_order_and_units():
    lines = scores_markdown(SCORES).splitlines()
    assert lines[0] == "| system | exact match | token F1 | loss | zeros (%) |"
    assert lines[2] == "| zero-shot | 3.2 | 10.0 | 2.740 | – |"
    assert lines[3] == "| a \\| b | 50.0 | 61.3 | – | 45.7 |"


def test_the_terminal_table_has_the_same_cells():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(scores_table(SCORES))
    text = console.export_text()
    assert "qa, ar, 100 test rows, seed 42" in text
    assert text.index("zero-shot") < text.index("a | b")
    assert all(cell in text for cell in ("3.2", "2.740", "61.3", "45.7"))


def test_the_report_names_outcome_picture_and_scores(tmp_path):
    write_json(tmp_path / "ratio.json", {"ratio": 0.4, "verdict": "flat"})
    write_json(tmp_path / "scores.json", SCORES)
    (tmp_path / "ratio.png").touch()
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "**0.400**" in text
    assert "no gain over the lowest ratio could be shown" in text
    assert "(ratio.png)" in text
    assert scores_markdown(SCORES) in text


def test_a_run_without_scores_has_no_report(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"ratio\.json"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("final", "unpruned", "said"),
    [
        (0.9, 0.8, "0.100 above that of the same merge fine-tuned unpruned: pruning did not help"),
        (0.7, 0.8, "0.100 below that of the same merge fine-tuned unpruned: pruning may have"),
    ],
)
def test_the_report_says_in_words_whether_pruning_paid(final, unpruned, said):
    systems = [
        {"slug": "merged-finetuned", "name": "unpruned", "loss": unpruned},
        {"slug": "final", "name": "final", "loss": final},
    ]
    sentence = comparison({"systems": systems})
    assert said in sentence
    assert ("The lowest loss is that of: unpruned." in sentence) == (final > unpruned)


def test_without_baselines_nothing_is_compared():
    assert comparison({"systems": [{"slug": "final", "name": "final", "loss": 1.0}]}) == ""
