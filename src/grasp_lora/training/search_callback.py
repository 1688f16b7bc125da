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
from grasp_lora.core.controller.profiles import (
    ProfileChoice,
    can_tilt,
    choose_profile,
    propose_profiles,
    with_profile,
)
from grasp_lora.core.controller.rounds import (
    ControllerConfig,
    ControllerState,
    RatioChoice,
    RoundRecord,
)
from grasp_lora.core.pruning.n_of_m import known_ratio
from grasp_lora.core.pruning.profile import Profile, Slopes, profile_ratios
from grasp_lora.models.example_losses import EncodedExamples, State, losses_in_states
from grasp_lora.models.preserve import preserved
from grasp_lora.training.groups import ratio_by_group
from grasp_lora.training.live import (
    BlockFit,
    BlockRatio,
    ImportanceRule,
    LiveAdapter,
    Masks,
    block_importance,
)


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
        slopes: how groups of blocks differ, to search tilts beside the ratio; None searches one
            ratio for all.
    """

    config: ControllerConfig
    rule: ImportanceRule
    norms: Mapping[str, Any] | None
    seed: int
    total_steps: int
    planned_rounds: int
    fit: BlockFit | None = None
    slopes: Slopes | None = None


@dataclass(frozen=True)
class _Measured:
    """The measurements of one round.

    Attributes:
        drawn: positions of the examples in the pool.
        candidates: the profiles that were proposed.
        baseline: objective of each example under the model as it is, or None.
        losses: objective of each example under the masks of each candidate.
        masks: profile -> masks.
    """

    drawn: Sequence[int]
    candidates: Sequence[Profile]
    baseline: list[float] | None
    losses: list[list[float]]
    masks: Mapping[Profile, Masks]


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
        self.controller = rounds.begin(config, settings.planned_rounds, self._count_tilts())
        self.flipped: list[int] = []
        """For each round, the number of entries whose mask changed."""
        self.forwards = 0
        """Examples read in forward passes so far."""
        self.log: Log | None = None
        """Is given the `scalars` of every round of a training."""

    def _count_tilts(self) -> int:
        settings = self._settings
        able = can_tilt(self._config, settings.planned_rounds, self._groups())
        return len(settings.slopes.names) if settings.slopes is not None and able else 0

    def _groups(self) -> list[str]:
        """Return the group of each example of the pool."""
        return [example.group for example in self._pool.examples.encoded]

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
            groups, generator = self._groups(), self._generator
            drawn = rounds.next_examples(self.controller, groups, self._config, generator)
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
        groups = self._groups()
        proposed = propose_profiles(self.controller, self._config, self._generator, groups)
        structure = self._live.structure
        candidates = tuple(Profile(known_ratio(structure, p.level), p.tilts) for p in proposed)
        # Candidates near a bound are often clipped to it, so measure each distinct one once.
        distinct = list(dict.fromkeys(candidates))
        with self._clock.span("masks"):
            masks = dict(zip(distinct, self._masks(distinct), strict=True))
        states: list[State] = [partial(self._under, masks[profile]) for profile in distinct]
        compared = rounds.needs_baseline(self._config)
        if compared:
            states.insert(0, self._as_it_is)
        found = self._measure(states, drawn, batches)
        baseline = found.pop(0) if compared else None
        measured = dict(zip(distinct, found, strict=True))
        losses = [measured[profile] for profile in candidates]
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
            [profile.level for profile in found.candidates],
            found.baseline,
            found.losses,
            found.drawn,
            step,
            [profile.tilts for profile in found.candidates] if self.controller.tilts else (),
        )
        flipped = 0
        if record.committed and masked:
            with self._clock.span("masks"):
                plain = Profile(record.mask_ratio, (0.0,) * len(self.controller.tilts))
                wanted = found.masks.get(plain) or self._masks([plain])[0]
                flipped = self._live.commit(wanted, optimizer, self._config.clear_moments)
        self.flipped.append(flipped)
        self._on_round(self.controller, record)

    def _masks(self, profiles: Sequence[Profile]) -> list[Masks]:
        return self._live.masks(self._importance, [self._wanted(one) for one in profiles])

    def _wanted(self, profile: Profile) -> float | BlockRatio:
        if not profile.tilted:
            return profile.level
        assert self._settings.slopes is not None, "tilts are searched along slopes"
        low, high = self._config.low, self._config.high
        ratios = profile_ratios(profile, self._settings.slopes, low, high)
        return ratio_by_group("policy", ratios)

    def choose(self) -> RatioChoice:
        """Return the ratio that the rounds so far speak for, and the evidence.

        It is the level of the profile where that is taken, see `choose_profile`.
        """
        choice = rounds.choose_ratio(self.controller, self._config, self._groups())
        found = self.choose_profile()
        if found is not None and found.shown:
            choice = with_profile(choice, found)
        return replace(choice, ratio=known_ratio(self._live.structure, choice.ratio))

    def choose_profile(self) -> ProfileChoice | None:
        """Return the profile that the rounds speak for; None if no tilts were measured."""
        return choose_profile(self.controller, self._config, self._groups())

    def cut(self, ratio: float) -> None:
        """Make the masks of `ratio` those of an adapter that is not trained any further."""
        self._live.commit(self._masks([Profile(ratio)])[0])

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
