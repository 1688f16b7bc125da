"""How often the tests of a run see what is not there, and what is, by examples per context.

    OMP_NUM_THREADS=1 python -m benchmarks.levels --json levels.json
    python -m benchmarks.levels --only over-pruned --contexts 10

Nothing is trained: losses are drawn. The difference of two systems on an example is normal, and its
variance is shared by the examples of a context to the fraction `icc` (intraclass correlation). A
level is the fraction of draws without any true difference where the test fires; it should be 5 %.
The power is that where the true difference is three standard errors of a mean over all examples
(for `learned`, over the 36 that the last three rounds of a search read).

Every decision is made twice on the same draws: over contexts, as the library does it, and by row,
with every example as its own group. For `learned` a whole search of the default controller is made
on a flat curve or one with a valley at ratio 0.4, and the ratio that it chose is tested.

JSON: `decisions`, by name: a list of `contexts`, `rows` (a context), `icc`, `draws`, `level`,
`level_by_row`, `power`; the errors of levels follow from `draws`.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import common
from benchmarks.worlds import RATIOS, SMOOTH, SPREAD
from grasp_lora.base.files import write_json
from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.rounds import ControllerConfig
from grasp_lora.core.evidence import findings
from grasp_lora.core.evidence.crossfit import gain_of_best
from grasp_lora.core.evidence.groups import LEVEL
from grasp_lora.core.evidence.verdict import gain_at

CONTEXTS = (4, 10, 33, 66)
SHAPES = ((1, 0.0), (2, 0.0), (2, 0.5), (5, 0.0), (5, 0.5))
"""(examples of a context, intraclass correlation)."""
EFFECT = 3.0
"""True difference of a power, in standard errors of a mean over all examples."""
CONFIRMED = 36
"""Examples of the last three rounds of a search, which its power goes by."""
ALIKE = 0.8
VALLEY, WIDTH = 0.4, 0.15
SCALE, ROUGH = 0.1, 0.0025
"""Of the noise of a search in nats: smooth in the ratio, and of every single loss."""
Groups = list[str] | None


@dataclass(frozen=True)
class Sample:
    """Contexts whose examples are drawn.

    Attributes:
        contexts: how many.
        rows: examples of each.
        icc: fraction of the variance that the examples of a context share.
        random: source of the draws.
    """

    contexts: int
    rows: int
    icc: float
    random: np.random.Generator

    @property
    def groups(self) -> list[str]:
        """The context of each example."""
        return [str(context) for context in range(self.contexts) for _ in range(self.rows)]

    def effect(self, most: int | None = None) -> float:
        """Return the true difference of a power, in standard deviations of an example.

        Args:
            most: examples that are read, of as many contexts as there are; None reads all.
        """
        read = min(most or self.contexts * self.rows, self.contexts * self.rows)
        alike = 1 + (read / min(self.contexts, read) - 1) * self.icc
        return EFFECT * float(np.sqrt(alike / read))

    def noise(self, systems: int) -> np.ndarray:
        """Return normal noise of variance 1, [systems, examples]."""
        shared = self.random.standard_normal((systems, self.contexts, 1))
        own = self.random.standard_normal((systems, self.contexts, self.rows))
        mixed = np.sqrt(self.icc) * shared + np.sqrt(1 - self.icc) * own
        return mixed.reshape(systems, -1)


Fires = Callable[[Sample, float], tuple[bool, bool]]
"""(sample, true difference) -> whether the test fires over contexts, and by row."""


def _both(sample: Sample, fires: Callable[[Groups], bool]) -> tuple[bool, bool]:
    return fires(sample.groups), fires(None)


def over_pruned(sample: Sample, effect: float) -> tuple[bool, bool]:
    """One system against another; `undertrained` of one run is the same test."""
    (gap,) = sample.noise(1) + effect
    worse, whole = gap.tolist(), [0.0] * gap.size
    return _both(sample, lambda groups: findings.over_pruned(worse, whole, groups) is not None)


def not_worth_merging(sample: Sample, effect: float) -> tuple[bool, bool]:
    """Two single adapters against the result; one of them may be better."""
    noise = sample.noise(3)
    noise[1] -= np.sqrt(2) * effect  # the noise of a difference of two systems
    final, *alone = noise.tolist()
    names = {"source": alone[0], "target": alone[1]}
    return _both(
        sample, lambda groups: findings.not_worth_merging(final, names, groups) is not None
    )


def unrepresentative(sample: Sample, effect: float) -> tuple[bool, bool]:
    """A fourth of the contexts is micro-dev, the others dev: do both gain alike?"""
    count = sample.contexts // 4 * sample.rows
    (gains,) = sample.noise(1)
    gains[:count] += effect * np.sqrt(16 / 3)  # the error of a difference of means of 1/4 and 3/4
    config = ControllerConfig()
    losses = [[0.0] * gains.size, (-gains).tolist()]
    state, _ = rounds.conclude(
        rounds.begin(config), config, (0.0, 0.4), None, losses, range(gains.size), 1
    )
    return _both(
        sample,
        lambda groups: (
            findings.unrepresentative(state.records, 0.4, range(count), groups) is not None
        ),
    )


def _best(challengers: int, references: int, lead: float = 0.0) -> Fires:
    """Return the test of the best of several against the best of others.

    Args:
        challengers: how many; one of them has the gain of a power.
        references: how many; as merges of the same adapters, they share four fifths of their noise.
        lead: how much better than the other references, in standard errors, one of them is, and one
            of the challengers where there is no gain.
    """

    def fires(sample: Sample, effect: float) -> tuple[bool, bool]:
        losses = sample.noise(challengers + references)
        if references > 1:
            losses[challengers:] *= np.sqrt(1 - ALIKE)
            losses[challengers:] += np.sqrt(ALIKE) * sample.noise(1)
        worse = lead * sample.effect() / EFFECT
        losses[1:] += worse
        losses[challengers] -= worse
        losses[0] -= np.sqrt(2) * effect
        named = {str(number): one.tolist() for number, one in enumerate(losses)}
        sides = (
            {n: one for n, one in named.items() if int(n) < challengers},
            {n: one for n, one in named.items() if int(n) >= challengers},
        )

        def shown(groups: Groups) -> bool:
            gain = gain_of_best(*sides, groups)
            return gain is not None and gain.shown

        return _both(sample, shown)

    return fires


def learned(sample: Sample, effect: float) -> tuple[bool, bool]:
    """A search of the default controller, which may have a valley at ratio 0.4 to find."""
    if effect:
        effect = sample.effect(CONFIRMED)
    smooth = sample.noise(len(RATIOS)).T @ SMOOTH.T  # [examples, ratios], of variance 1
    place = int(np.abs(RATIOS - VALLEY).argmin())
    depth = effect * float(np.hypot(SCALE * SPREAD[place], np.sqrt(2) * ROUGH))
    curve = -depth * np.exp(-((RATIOS - VALLEY) ** 2) / (2 * WIDTH**2))
    seen = curve + SCALE * SPREAD * smooth
    config, groups = ControllerConfig(), sample.groups
    assert config.rounds is not None, "the default has a number of rounds"
    generator = torch.Generator().manual_seed(int(sample.random.integers(2**31)))
    state = rounds.begin(config)
    for step in range(config.rounds):
        rows = rounds.next_examples(state, groups, config, generator)
        tried = rounds.propose(state, config, generator)
        losses = [
            (
                np.array([np.interp(ratio, RATIOS, seen[row]) for row in rows])
                + ROUGH * sample.random.standard_normal(len(rows))
            ).tolist()
            for ratio in tried
        ]
        state, _ = rounds.conclude(state, config, tried, None, losses, rows, step)
    choice = rounds.choose_ratio(state, config, groups)
    by_row = gain_at(choice.ratio, state.records, config, None, config.rounds)
    return choice.verdict == "learned", by_row is not None and by_row.p_value <= LEVEL


@dataclass(frozen=True)
class Decision:
    """What is decided.

    Attributes:
        fires: makes it once.
        about: a few words for the table.
        costly: a fourth as many draws are made, for their time.
    """

    fires: Fires
    about: str
    costly: bool = False


DECISIONS: Mapping[str, Decision] = {
    "over-pruned": Decision(over_pruned, "`over-pruned`, and `undertrained` of one run"),
    "not-worth-merging": Decision(not_worth_merging, "`not-worth-merging` of two adapters"),
    "unrepresentative": Decision(unrepresentative, "`unrepresentative` (two-sided)"),
    "best of 10": Decision(
        _best(10, 1), "best of 10 against 1 (`merge.weights: auto`)", costly=True
    ),
    "best of 5": Decision(_best(5, 19), "best of 5 against best of 19 (precheck)", costly=True),
    "best of 5, led": Decision(
        _best(5, 19, lead=2.0),
        "the same, where one of the 19 leads the others by 2 errors",
        costly=True,
    ),
    "learned": Decision(learned, "`learned`, by a whole search", costly=True),
    "best of 5, far ahead": Decision(
        _best(5, 19, lead=6.0),
        "best of 5 against best of 19, where one of the 19 leads the others by 6 errors",
        costly=True,
    ),
}
"""Name -> what is decided."""


def measured(
    name: str, contexts: int, shape: tuple[int, float], draws: int, seed: int
) -> dict[str, Any]:
    """Return level, level by row and power of a decision at one number of contexts."""
    decision, (rows, icc) = DECISIONS[name], shape
    own = (seed, list(DECISIONS).index(name), contexts, rows, int(100 * icc))
    sample = Sample(contexts, rows, icc, np.random.default_rng(own))
    made = max(1, draws // 4) if decision.costly else draws
    false = np.array([decision.fires(sample, 0.0) for _ in range(made)])
    true = np.array([decision.fires(sample, sample.effect()) for _ in range(max(1, made // 4))])
    level, by_row = false.mean(axis=0).tolist()
    return {
        "contexts": contexts,
        "rows": rows,
        "icc": icc,
        "draws": made,
        "level": level,
        "level_by_row": by_row,
        "power": float(true[:, 0].mean()),
    }


def markdown(decisions: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Return a table with a row for each shape: level, level by row, power at each number."""
    contexts = sorted({one["contexts"] for found in decisions.values() for one in found})
    lines = [
        f"| decision | rows, icc | {' | '.join(f'{n} contexts' for n in contexts)} |",
        f"|---|---|{'---:|' * len(contexts)}",
    ]
    for name, found in decisions.items():
        for shape in dict.fromkeys((one["rows"], one["icc"]) for one in found):
            by_number = {
                one["contexts"]: one for one in found if (one["rows"], one["icc"]) == shape
            }
            cells = [_cell(by_number.get(number)) for number in contexts]
            about = DECISIONS[name].about
            lines.append(f"| {about} | {shape[0]}, {shape[1]:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(one: Mapping[str, Any] | None) -> str:
    if one is None:
        return "–"
    return f"{one['level']:.1%} ({one['level_by_row']:.1%}), {one['power']:.0%}"


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    parser.add_argument("--only", nargs="+", choices=DECISIONS, metavar="DECISION")
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--draws", type=int, default=4000, help="of a level; a power has a fourth")
    parser.add_argument("--seed", type=int, default=20000)
    parser.add_argument("--quick", action="store_true", help="40 draws")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure all levels, print the table and return the result."""
    options = parsed(argv)
    torch.set_num_threads(1)
    draws = 40 if options.quick else options.draws
    decisions: dict[str, list[dict[str, Any]]] = {}
    for name in options.only or DECISIONS:
        decisions[name] = [
            measured(name, contexts, shape, draws, options.seed)
            for shape in SHAPES
            for contexts in options.contexts
        ]
        print(markdown({name: decisions[name]}), flush=True)
    found = {"versions": common.versions(), "draws": draws, "decisions": decisions}
    if options.json is not None:
        write_json(options.json, found)
    return found


if __name__ == "__main__":
    main()
