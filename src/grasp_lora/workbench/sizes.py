"""An adapter in fewer bytes: what lower ranks and shorter numbers of its modules cost, by probes.

Nothing is trained. An adapter's modules are divided into groups, and each option of a group is
measured alone, with all else as it is, on the same examples. See `core.budget` for the choice.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from grasp_lora.adapters.attach import FactorPair
from grasp_lora.adapters.folder import check_fits, read_adapter
from grasp_lora.base.choice import lowest
from grasp_lora.base.words import shown_path
from grasp_lora.core.budget import (
    DROP,
    OPTIONS,
    WHOLE,
    Option,
    Priced,
    Shape,
    added,
    adds_up,
    best_fit,
    cost_of,
    groups_of,
    least_bytes,
    options_of,
)
from grasp_lora.core.controller.rounds import draw_examples
from grasp_lora.core.evidence.groups import Gain
from grasp_lora.core.lora import Adapter, MergedModule, merge
from grasp_lora.core.packing import Packed, packed
from grasp_lora.models.example_losses import Batch, State, losses_in_states
from grasp_lora.training.live import LiveAdapter
from grasp_lora.workbench.context import POOLS, Context
from grasp_lora.workbench.merge_probes import LEAST_EXAMPLES

SPLITS = POOLS["micro-dev+dev"]
"""Splits of the target that choose."""
ROWS = 48
MEGABYTE = 10**6
BY_OPTIONS = "options"
"""Name of the whole whose options were chosen group by group."""

Choice = Mapping[str, Option]
"""Group of modules -> option."""


def shapes_of(adapter: Adapter) -> dict[str, Shape]:
    """Return module -> the sizes of its factors; a rank that its weight cannot have is cut."""
    return {
        name: Shape(min(one.rank, inputs, outputs), inputs, outputs)
        for name, one in adapter.items()
        for inputs, outputs in [(one.A.shape[1], one.B.shape[0])]
    }


def check_budget(megabytes: float, adapter: Adapter) -> int:
    """Return a budget in bytes.

    Args:
        megabytes: the budget, in units of 10^6 bytes.
        adapter: what is to fit it.

    Raises:
        ValueError: it is not above 0 or not finite, or below the fewest bytes that leave a group.
    """
    if not 0 < megabytes < math.inf:
        raise ValueError(
            f"a budget of {megabytes:g} MB is no size; give megabytes above 0, like 0.5"
        )
    shapes = shapes_of(adapter)
    parts = groups_of(list(shapes))
    least = least_bytes({name: [shapes[one] for one in own] for name, own in parts.items()})
    budget = _in_bytes(megabytes)
    if budget < least:
        raise ValueError(
            f"a budget of {megabytes:g} MB holds nothing of this adapter: the least is "
            f"{least / MEGABYTE:.6f} MB, one of its {len(parts)} groups of modules at a quarter of "
            "its rank in int4; give more, or use the bare model"
        )
    return budget


def check_least(megabytes: float, adapters: Sequence[Adapter]) -> None:
    """Check a budget before there is the adapter that is to fit it.

    Args:
        megabytes: the budget, in units of 10^6 bytes, above 0.
        adapters: what the adapter is made of; only the sizes of their modules are read.

    Raises:
        ValueError: it is below the bytes of the smallest module at rank 1.
    """
    shapes = [one for adapter in adapters for one in shapes_of(adapter).values()]
    least = min(Option(1, "int4").size([replace(one, rank=1)]) for one in shapes)
    if _in_bytes(megabytes) < least:
        raise ValueError(
            f"budget_mb: {megabytes:g} MB holds nothing of an adapter of this model: its smallest "
            f"module takes {least / MEGABYTE:.6f} MB at rank 1 in int4; give more"
        )


def _in_bytes(megabytes: float) -> int:
    # A fraction like 0.29 is a little less than it says.
    return math.floor(round(megabytes * MEGABYTE, 3))


@dataclass(frozen=True)
class Drawn:
    """The examples of a probe: their ids, their groups such as contexts, and their batches."""

    ids: list[str]
    groups: list[str]
    batches: Sequence[tuple[list[int], Batch]]


class Resizable:
    """An adapter on its backbone, to be measured with other ranks and number formats.

    Args:
        live: the adapter, in one mask unit a module.
        adapter: its factors.
    """

    def __init__(self, live: LiveAdapter, adapter: Adapter):
        self.live = live
        self.shapes = shapes_of(adapter)
        self.parts = groups_of(list(adapter))
        # By falling singular values, so that the first components are the best fit of any rank.
        self._components = _pairs(merge("svd", [adapter], [1.0]))
        # All components are rounded as they were trained: the error of a delta is less.
        self._trained = _pairs(merge("cat", [adapter], [1.0]))

    def options(self, part: str) -> list[Option]:
        """Return the options of a group of modules."""
        return options_of(self._shapes(part))

    def size(self, part: str, option: Option) -> int:
        """Return the bytes of a group under an option."""
        return option.size(self._shapes(part))

    def bytes_of(self, choice: Choice) -> int:
        """Return the bytes of the adapter under a choice."""
        return sum(self.size(part, option) for part, option in choice.items())

    def uniform(self, option: Option) -> Choice:
        """Return the choice of one option for all groups."""
        return dict.fromkeys(self.parts, option)

    def packed(self, choice: Choice) -> dict[str, Packed]:
        """Return module -> its factors as they are stored; without those that are dropped."""
        found: dict[str, Packed] = {}
        for part, option in choice.items():
            for name in self.parts[part] if option != DROP else ():
                rank = option.rank(self.shapes[name].rank)
                A, B = self._trained[name]
                if rank < len(A):
                    A, B = self._components[name]
                found[name] = packed(option.form, A[:rank], B[:, :rank])
        return found

    def losses(self, choices: Sequence[Choice | None], drawn: Drawn) -> list[list[float]]:
        """Return [choices][examples] losses in nats; None stands for the adapter as it is."""
        states: list[State] = [
            partial(self.live.scaled, 1.0) if one is None else partial(self.under, one)
            for one in choices
        ]
        return losses_in_states(self.live.model, states, drawn.batches, len(drawn.ids))

    @contextmanager
    def under(self, choice: Choice) -> Iterator[None]:
        """Run the body with the adapter under a choice, in eval mode, then restore everything."""
        values = {name: torch.zeros_like(one) for name, one in self.live.params.items()}
        for name, own in self.packed(choice).items():
            for side, factor in zip("AB", own.factors(), strict=True):
                place = values[f"{name}.{side}"]
                rows, columns = factor.shape
                place[:rows, :columns] = factor
        with self.live.replaced(values):
            yield

    def _shapes(self, part: str) -> list[Shape]:
        return [self.shapes[name] for name in self.parts[part]]


def _pairs(merged: Mapping[str, MergedModule]) -> dict[str, FactorPair]:
    return {name: (one.A, one.B) for name, one in merged.items()}


@contextmanager
def resizable(context: Context, folder: Path) -> Iterator[Resizable]:
    """Attach an adapter to the backbone for the body of the `with`.

    Raises:
        FileNotFoundError, ValueError: the folder holds no adapter, or it does not fit the backbone.
    """
    loaded = read_adapter(folder, context.backbone.model)
    check_fits(loaded, context.backbone.model, shown_path(folder))
    with context.live(merge("cat", [loaded.adapter], [1.0]), "merged") as live:
        yield Resizable(live, loaded.adapter)


def drawn_for_sizes(context: Context, rows: int = ROWS) -> Drawn:
    """Return examples of `SPLITS` to measure on.

    Args:
        context: the examples.
        rows: how many; all are taken if there are fewer.

    Raises:
        ValueError: there are fewer than 4.
    """
    pool = context.rows("target", SPLITS)
    if len(pool.encoded) < LEAST_EXAMPLES:
        raise ValueError(
            f"options of an adapter are measured on at least {LEAST_EXAMPLES} micro-dev and dev "
            f"examples, got {len(pool.encoded)}; raise data.target.rows.micro_dev"
        )
    generator = torch.Generator().manual_seed(context.config.seed)
    places = draw_examples([one.group for one in pool.encoded], rows, generator)
    chosen = [pool.encoded[place] for place in places]
    return Drawn([e.id for e in chosen], [e.group for e in chosen], pool.batches(places))


@dataclass(frozen=True)
class OptionLosses:
    """What every option of every group costs, each measured alone.

    Attributes:
        groups: group of each example, such as its context.
        base: loss of each example in nats, with all modules as `WHOLE`.
        singles: group of modules -> option -> losses; without `WHOLE`.
    """

    groups: Sequence[str]
    base: list[float]
    singles: Mapping[str, Mapping[Option, list[float]]]

    def of(self, part: str, option: Option) -> list[float]:
        """Return the loss of each example with one group under an option."""
        return self.base if option == WHOLE else self.singles[part][option]

    def added(self, part: str, option: Option) -> Gain:
        """Return the loss that an option of a group adds, in nats."""
        return added(self.of(part, option), self.base, self.groups)


def probed_options(sizes: Resizable, drawn: Drawn, done: Callable[[int], Any]) -> OptionLosses:
    """Measure every option of every group alone, and the adapter in bf16.

    Args:
        sizes: the adapter.
        drawn: the examples.
        done: called with the number of groups that are done.
    """
    whole = sizes.uniform(WHOLE)
    (base,) = sizes.losses([whole], drawn)
    singles: dict[str, dict[Option, list[float]]] = {}
    for count, part in enumerate(sizes.parts):
        tried = [option for option in sizes.options(part) if option != WHOLE]
        losses = sizes.losses([{**whole, part: option} for option in tried], drawn)
        singles[part] = dict(zip(tried, losses, strict=True))
        done(count + 1)
    return OptionLosses(drawn.groups, base, singles)


@dataclass(frozen=True)
class Fitted:
    """The choice under a budget, and what showed it.

    Attributes:
        choice: group of modules -> option.
        losses: of each example under the choice, in nats.
        by: "options"; "uniform", if one option for all groups was better; or "whole", if all fits.
        tried: name -> losses of every whole that was measured, "options" first where one fits.
        excess: how much worse the options are together than their sum says; None if none fit.
    """

    choice: Choice
    losses: list[float]
    by: str
    tried: Mapping[str, list[float]]
    excess: Gain | None


def fitted(sizes: Resizable, found: OptionLosses, drawn: Drawn, budget: int) -> Fitted:
    """Choose the options of all groups, and measure the whole.

    If the whole is worse than its options say together, by more than the standard error of that
    difference, each option that fits for all groups alike is measured too, and the best is taken.

    Args:
        sizes: the adapter.
        found: the losses of its options.
        drawn: the examples of `found`.
        budget: most bytes.

    Raises:
        ValueError: nothing that fits has a finite loss.
    """
    priced = {
        part: [
            Priced(option, sizes.size(part, option), cost_of(found.added(part, option)))
            for option in sizes.options(part)
        ]
        for part in sizes.parts
    }
    best = best_fit(priced, budget)
    choices: dict[str, Choice] = {}
    tried: dict[str, list[float]] = {}
    excess = None
    if best is not None:
        choices[BY_OPTIONS] = best
        (tried[BY_OPTIONS],) = sizes.losses([best], drawn)
        singles = [found.of(part, option) for part, option in best.items()]
        excess = adds_up(tried[BY_OPTIONS], found.base, singles, drawn.groups)
    if excess is None or excess.gain > excess.error:
        alike = {one.name: sizes.uniform(one) for one in OPTIONS if one != DROP}
        fits = {name: one for name, one in alike.items() if sizes.bytes_of(one) <= budget}
        choices |= fits
        tried |= dict(zip(fits, sizes.losses(list(fits.values()), drawn), strict=True))
    name = lowest({name: sum(own) / len(own) for name, own in tried.items()})
    if name is None:
        raise ValueError(
            "nothing of this adapter that fits the budget has a finite loss; use model.dtype "
            "float32 if the model overflows in half precision, or raise the budget"
        )
    by = BY_OPTIONS if name == BY_OPTIONS else "uniform"
    return Fitted(choices[name], tried[name], by, tried, excess)
