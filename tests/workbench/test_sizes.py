"""An adapter's sizes by probes: what is measured, and when one size for all is taken."""

import math

import pytest

from grasp_lora.config.run_config import make_config
from grasp_lora.core.budget import WHOLE, Option
from grasp_lora.core.evidence.groups import Gain
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.sizes import OptionLosses, drawn_for_sizes, fitted, probed_options
from helpers import tiny_backbone_folder
from jobs import job


class Losses:
    """Stands for a `Resizable` of two groups whose wholes have the losses that a test gives."""

    def __init__(self, wholes):
        self.parts = {"a": ["a"], "b": ["b"]}
        self.wholes = wholes

    def options(self, part):
        return [WHOLE, Option(2)]

    def size(self, part, option):
        return {WHOLE: 100, Option(2): 50, Option(4): 25}.get(option, 1000)

    def bytes_of(self, choice):
        return sum(self.size(part, option) for part, option in choice.items())

    def uniform(self, option):
        return dict.fromkeys(self.parts, option)

    def losses(self, choices, drawn):
        return [self.wholes[tuple(one.values())] for one in choices]


class Rows:
    ids = groups = ("p", "q", "r", "s")


BASE = [1.0, 2.0, 3.0, 4.0]


def found_by(whole, alike):
    """Return what is chosen where the half of a costs 0.1 nats alone, and that of b 0.5."""
    plus = {"a": 0.1, "b": 0.5}
    singles = {part: {Option(2): [one + cost for one in BASE]} for part, cost in plus.items()}
    wholes = {(Option(2), WHOLE): [one + more for one, more in zip(BASE, whole, strict=True)]}
    wholes |= {(one, one): [base + plus for base in BASE] for one, plus in alike.items()}
    sizes = Losses(wholes)
    return fitted(sizes, OptionLosses(Rows.groups, BASE, singles), Rows(), 150)


def test_options_that_add_up_are_taken():
    found = found_by([0.1, 0.1, 0.2, 0.0], {})
    assert (found.by, found.choice) == ("options", {"a": Option(2), "b": WHOLE})
    assert found.excess == Gain(pytest.approx(0.0), pytest.approx(0.0408, abs=1e-4), 4)
    assert list(found.tried) == ["options"]


@pytest.mark.parametrize(
    ("alike", "by", "wanted"),
    [
        ({Option(2): 0.7, Option(4): 0.6}, "uniform", {"a": Option(4), "b": Option(4)}),
        ({Option(2): 0.7, Option(4): 1.6}, "uniform", {"a": Option(2), "b": Option(2)}),
        ({Option(2): 1.7, Option(4): 1.6}, "options", {"a": Option(2), "b": WHOLE}),
        ({Option(2): math.nan, Option(4): math.inf}, "options", {"a": Option(2), "b": WHOLE}),
    ],
)
def test_one_option_for_all_is_taken_where_the_whole_is_worse_than_its_sum(alike, by, wanted):
    found = found_by([0.9, 1.0, 1.1, 1.0], alike)
    assert found.excess.gain == pytest.approx(0.9)
    assert (found.by, found.choice) == (by, wanted)
    assert set(found.tried) == {"options", "r/2 bf16", "r/4 bf16"}


def test_nothing_finite_is_said():
    nothing = {Option(2): math.nan, Option(4): math.inf}
    with pytest.raises(ValueError, match="has a finite loss"):
        found_by([math.nan] * 4, nothing)


def test_every_option_of_a_group_is_measured_with_the_others_whole():
    asked = []

    class Noting(Losses):
        def losses(self, choices, drawn):
            asked.extend(choices)
            return [[0.0] * 4 for _ in choices]

    done = []
    found = probed_options(Noting({}), Rows(), done.append)
    whole = {"a": WHOLE, "b": WHOLE}
    assert asked == [whole, whole | {"a": Option(2)}, whole | {"b": Option(2)}]
    assert {part: list(own) for part, own in found.singles.items()} == {
        "a": [Option(2)],
        "b": [Option(2)],
    }
    assert done == [1, 2]


def test_few_examples_are_refused(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    context = open_context(make_config(job(tmp_path)), quiet=True)
    few = context.on_target({"micro_dev": context.examples("target", "micro_dev")[:3]})
    with pytest.raises(ValueError, match="at least 4 micro-dev and dev examples, got 3"):
        drawn_for_sizes(few)
