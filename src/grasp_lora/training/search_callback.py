"""Trainer callbacks that run controller rounds and keep pruned entries at zero.

The order of one optimizer step in transformers is: clip -> `on_pre_optimizer_step` -> step ->
`on_optimizer_step` (before `global_step` is incremented) -> scheduler -> zero_grad ->
`global_step += 1` -> `on_step_end` -> save -> `on_save`. Probes therefore run in `on_step_end`,
when there are no gradients. Pruned entries are set to zero in `on_optimizer_step`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from grasp_lora.base.clock import Clock
from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.rounds import (
    ControllerConfig,
    ControllerState,
    RatioChoice,
    RoundRecord,
)
from grasp_lora.core.pruning.n_of_m import known_ratio
from grasp_lora.models.example_losses import EncodedExamples, State, losses_in_states
from grasp_lora.models.preserve import preserved
from grasp_lora.training.live import BlockFit, ImportanceRule, LiveAdapter, Masks, block_importance


class MaskCallback(TrainerCallback):
    """Keeps pruned entries at zero after every optimizer step; optionally renews the masks.

    Args:
        live: the adapter.
        reprune: renews the masks at a fixed ratio; it is called with the optimizer. None keeps the
            masks.
        every: optimizer steps between two calls of `reprune`.
    """

    def __init__(
        self,
        live: LiveAdapter,
        reprune: Callable[[torch.optim.Optimizer | None], None] | None = None,
        every: int = 1,
    ):
        self._live = live
        self._reprune = reprune
        self._every = every

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set pruned entries to zero."""
        self._live.zero_pruned()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Renew the masks every `every` steps."""
        if self._reprune is not None and state.global_step % self._every == 0:
            self._reprune(kwargs.get("optimizer"))


@dataclass(frozen=True)
class ProbePool:
    """The examples on which rounds measure candidates.

    Attributes:
        examples: the encoded examples.
        fresh: draw new examples each round; otherwise every round uses the first `config.rows`.
    """

    examples: EncodedExamples
    fresh: bool


Log = Callable[[dict[str, float]], None]
"""Takes numbers by name, as `Trainer.log` does."""
Objective = Callable[[nn.Module, Sequence[int]], list[float]]
"""(model in eval mode, positions in the pool) -> objective of each example; lower is better."""


@dataclass(frozen=True)
class SearchSettings:
    """Settings of the controller rounds of one run.

    Attributes:
        config: the controller's settings.
        rule: importance rule.
        norms: what `rule` needs, as in `block_importance`, or None.
        seed: seed of the controller's own random generator.
        total_steps: optimizer steps of the whole run.
        planned_rounds: rounds of the whole run.
        fit: how kept entries make up for pruned ones in a trial; None if they keep their values. A
            commit changes masks alone.
    """

    config: ControllerConfig
    rule: ImportanceRule
    norms: Mapping[str, Any] | None
    seed: int
    total_steps: int
    planned_rounds: int
    fit: BlockFit | None = None


@dataclass(frozen=True)
class _Measured:
    """The measurements of one round.

    Attributes:
        drawn: positions of the examples in the pool.
        candidates: the ratios that were proposed.
        baseline: objective of each example under the model as it is, or None.
        losses: objective of each example under the masks of each candidate.
        masks: ratio -> masks.
    """

    drawn: Sequence[int]
    candidates: Sequence[float]
    baseline: list[float] | None
    losses: list[list[float]]
    masks: Mapping[float, Masks]


def scalars(record: RoundRecord) -> dict[str, float]:
    """Return what trackers are given of a round; losses and rewards in nats.

    `grasp/ratio` is the ratio of the mask in force, `grasp/incumbent` the current ratio of the
    controller, `grasp/mu` and `grasp/sigma` its policy, `grasp/best` the candidate with the largest
    reward, `grasp/reward` and `grasp/loss` its reward and loss. What was not finite is left out.
    """
    found = {
        "ratio": record.mask_ratio,
        "incumbent": record.ratio,
        "mu": record.mu,
        "sigma": record.sigma,
        "best": record.best,
    }
    if record.best is not None:
        place = record.candidates.index(record.best)
        found |= {"reward": record.rewards[place], "loss": record.losses[place]}
    return {f"grasp/{name}": value for name, value in found.items() if value is not None}


class SearchCallback(TrainerCallback):
    """Runs a controller round at the steps that the settings name.

    Args:
        live: the adapter.
        pool: the examples to measure on.
        settings: settings of the rounds.
        on_round: called with the controller's state and the record of every completed round.
        clock: measures the seconds of `baseline`, `probe` and `masks`.
        objective: replaces the loss of the examples, for example by a metric of generated answers.
    """

    name = "search"

    def __init__(
        self,
        live: LiveAdapter,
        pool: ProbePool,
        settings: SearchSettings,
        on_round: Callable[[ControllerState, RoundRecord], None],
        clock: Clock | None = None,
        objective: Objective | None = None,
    ):
        self._live = live
        self._objective = objective
        self._settings = settings
        self._config = config = settings.config
        self._pool = pool
        self._importance = block_importance(settings.rule, settings.norms)
        self._on_round = on_round
        self._clock = clock or Clock()
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._fixed: list[tuple[list[int], Any]] | None = None
        self.controller = rounds.begin(config, settings.planned_rounds)
        self.flipped: list[int] = []
        """For each round, the number of entries whose mask changed."""
        self.forwards = 0
        """Examples read in forward passes so far."""
        self.log: Log | None = None
        """Is given the `scalars` of every round of a training."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run a round if one is due."""
        if rounds.is_due(state.global_step, self._settings.total_steps, self._config):
            self._round(state.global_step, kwargs.get("optimizer"))
            self._tell(control)

    def _tell(self, control: Any) -> None:
        """Hand the numbers of the last round on."""
        if self.log is None:
            return
        wanted = control.should_log
        flipped = {"grasp/flipped": float(self.flipped[-1])}
        self.log(scalars(self.controller.records[-1]) | flipped)
        # The Trainer takes any log for that of the step, which is still to come.
        control.should_log = wanted

    def run_untrained_round(self, number: int) -> None:
        """Run round `number` on an adapter that is not trained, without changing its masks."""
        self._round(number, None, masked=False)

    def _draw_examples(self) -> tuple[tuple[int, ...], list[tuple[list[int], Any]]]:
        """Return (positions in the pool, batches) of the examples of this round.

        An objective of its own reads no batches.
        """
        examples = self._pool.examples
        batches = examples.batches if self._objective is None else lambda _drawn: []
        if self._pool.fresh:
            groups = [e.group for e in examples.encoded]
            drawn = rounds.next_examples(self.controller, groups, self._config, self._generator)
            return drawn, batches(drawn)
        drawn = tuple(range(min(self._config.rows, len(examples.encoded))))
        if self._fixed is None:
            self._fixed = batches(drawn)
        return drawn, self._fixed

    def _measure(
        self,
        states: Sequence[State],
        drawn: Sequence[int],
        batches: list[tuple[list[int], Any]],
    ) -> list[list[float]]:
        """Return the objective of each drawn example in each state."""
        if self._objective is None:
            return losses_in_states(self._live.model, states, batches, len(drawn))
        found: list[list[float]] = []
        for state in states:
            with state():
                found.append(self._objective(self._live.model, drawn))
        return found

    @contextmanager
    def _as_it_is(self) -> Iterator[None]:
        with self._clock.span("baseline"), preserved(self._live.model, self._live.params):
            self._live.model.eval()
            yield

    @contextmanager
    def _under(self, masks: Masks) -> Iterator[None]:
        clock = self._clock
        trial = self._live.trial(masks, self._settings.fit)
        with clock.span("masks"), trial, clock.span("probe"):
            yield

    def _round(
        self, step: int, optimizer: torch.optim.Optimizer | None, masked: bool = True
    ) -> None:
        drawn, batches = self._draw_examples()
        proposed = rounds.propose(self.controller, self._config, self._generator)
        candidates = tuple(known_ratio(self._live.structure, ratio) for ratio in proposed)
        # Candidates near a bound are often clipped to it, so measure each distinct ratio once.
        distinct = list(dict.fromkeys(candidates))
        with self._clock.span("masks"):
            masks = dict(zip(distinct, self._live.masks(self._importance, distinct), strict=True))
        states: list[State] = [partial(self._under, masks[ratio]) for ratio in distinct]
        compared = rounds.needs_baseline(self._config)
        if compared:
            states.insert(0, self._as_it_is)
        found = self._measure(states, drawn, batches)
        baseline = found.pop(0) if compared else None
        measured = dict(zip(distinct, found, strict=True))
        losses = [measured[ratio] for ratio in candidates]
        self.forwards += len(drawn) * len(states)
        self._conclude(
            step, _Measured(drawn, candidates, baseline, losses, masks), optimizer, masked
        )

    def _conclude(
        self,
        step: int,
        found: _Measured,
        optimizer: torch.optim.Optimizer | None,
        masked: bool,
    ) -> None:
        """Update the controller with the measurements of a round, and the masks if it commits."""
        self.controller, record = rounds.conclude(
            self.controller,
            self._config,
            found.candidates,
            found.baseline,
            found.losses,
            found.drawn,
            step,
        )
        flipped = 0
        if record.committed and masked:
            with self._clock.span("masks"):
                wanted = found.masks.get(record.mask_ratio) or self._masks(record.mask_ratio)
                flipped = self._live.commit(wanted, optimizer, self._config.clear_moments)
        self.flipped.append(flipped)
        self._on_round(self.controller, record)

    def _masks(self, ratio: float) -> Masks:
        (masks,) = self._live.masks(self._importance, [ratio])
        return masks

    def choose(self) -> RatioChoice:
        """Return the ratio that the rounds so far speak for, and the evidence."""
        groups = [example.group for example in self._pool.examples.encoded]
        choice = rounds.choose_ratio(self.controller, self._config, groups)
        return replace(choice, ratio=known_ratio(self._live.structure, choice.ratio))

    def cut(self, ratio: float) -> None:
        """Make the masks of `ratio` those of an adapter that is not trained any further."""
        self._live.commit(self._masks(ratio))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the random state and the history of the rounds."""
        tensors = {"generator": self._generator.get_state()}
        values = {
            "controller": rounds.state_to_json(self.controller),
            "flipped": self.flipped,
            "forwards": self.forwards,
        }
        return tensors, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Load a state and drop the rounds after it."""
        self._generator.set_state(tensors["generator"])
        self.controller = rounds.state_from_json(values["controller"])
        self.flipped = list(values["flipped"])
        self.forwards = int(values["forwards"])
