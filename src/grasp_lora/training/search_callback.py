"""Trainer callbacks of the method: rounds of the controller, and masks that hold.

The order of one optimizer step in transformers: clip -> `on_pre_optimizer_step` -> step ->
`on_optimizer_step` (`global_step` not yet incremented) -> scheduler -> zero_grad ->
`global_step += 1` -> `on_step_end` -> save -> `on_save`. Probes therefore run in `on_step_end`,
when gradients are gone, and zeros are enforced in `on_optimizer_step`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from grasp_lora.base.clock import Clock
from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.rounds import ControllerConfig, ControllerState, RoundRecord
from grasp_lora.models.example_losses import EncodedExamples, example_losses
from grasp_lora.models.preserve import preserved
from grasp_lora.training.live import ImportanceRule, LiveAdapter, block_importance


class MaskCallback(TrainerCallback):
    """Keeps pruned entries at zero after every optimizer step; re-prunes at a fixed ratio if asked.

    Args:
        live: the adapter.
        reprune: called every `every` optimizer steps with the optimizer, or None for a fixed mask.
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
        """Enforce the zeros."""
        self._live.zero_pruned()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the mask anew where the schedule says so."""
        if self._reprune is not None and state.global_step % self._every == 0:
            self._reprune(kwargs.get("optimizer"))


@dataclass(frozen=True)
class ProbePool:
    """The rows that rounds draw from.

    Attributes:
        rows: the encoded rows.
        fresh: draw new rows each round; otherwise the first `config.rows` are used every time.
    """

    rows: EncodedExamples
    fresh: bool


Objective = Callable[[nn.Module, Sequence[int]], list[float]]
"""(model in eval mode, positions in the pool) -> what each row costs, lower is better."""


class SearchCallback(TrainerCallback):
    """Runs a controller round at the steps the settings name.

    Args:
        live: the adapter.
        config: the controller's settings.
        pool: rows to probe.
        rule: importance rule.
        norms: input norms of the rule, or None.
        seed: seed of the controller's own generator.
        total_steps: optimizer steps of the whole run.
        planned: rounds of the whole run.
        on_round: called with every round's record after it is closed.
        discard: probe, but never commit and never move (the probes' side effects can then be
            measured: there are none).
        clock: charged with `baseline`, `probe` and `masks`.
        objective: what takes the place of the rows' losses, such as a metric of generated answers.
    """

    name = "search"

    def __init__(
        self,
        live: LiveAdapter,
        config: ControllerConfig,
        pool: ProbePool,
        rule: ImportanceRule,
        norms: Mapping[str, Tensor] | None,
        seed: int,
        total_steps: int,
        planned: int,
        on_round: Callable[[ControllerState, RoundRecord], None],
        discard: bool = False,
        clock: Clock | None = None,
        objective: Objective | None = None,
    ):
        self._live = live
        self._objective = objective
        self._config = config
        self._pool = pool
        self._score = block_importance(rule, norms)
        self._total_steps = total_steps
        self._on_round = on_round
        self._discard = discard
        self._clock = clock or Clock()
        self._generator = torch.Generator().manual_seed(seed)
        self._fixed: list[tuple[list[int], Any]] | None = None
        self.controller = rounds.begin(config, planned)
        self.flipped: list[int] = []
        self.forwards = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open, run and close a round when one is due."""
        if rounds.is_due(state.global_step, self._total_steps, self._config):
            self._round(state.global_step, kwargs.get("optimizer"))

    def run_untrained_round(self, number: int) -> None:
        """Run a round on an adapter that is not trained, where no mask need be in force."""
        self._round(number, None, masked=False)

    def _rows(self) -> tuple[tuple[int, ...], list[tuple[list[int], Any]]]:
        rows = self._pool.rows
        if self._pool.fresh:
            groups = [e.group for e in rows.encoded]
            drawn = rounds.next_examples(self.controller, groups, self._config, self._generator)
            return drawn, rows.batches(drawn)
        drawn = tuple(range(min(self._config.rows, len(rows.encoded))))
        if self._fixed is None:
            self._fixed = rows.batches(drawn)
        return drawn, self._fixed

    def _costs(self, drawn: Sequence[int], batches: list[tuple[list[int], Any]]) -> list[float]:
        if self._objective is not None:
            return self._objective(self._live.model, drawn)
        return example_losses(self._live.model, batches, len(drawn))

    def _round(
        self, step: int, optimizer: torch.optim.Optimizer | None, masked: bool = True
    ) -> None:
        live, clock, score = self._live, self._clock, self._score
        drawn, batches = self._rows()
        candidates = rounds.propose(self.controller, self._config, self._generator)
        baseline = None
        if rounds.needs_baseline(self._config):
            with clock.span("baseline"), preserved(live.model, live.params):
                live.model.eval()
                baseline = self._costs(drawn, batches)
        # Near a bound several candidates are often that bound: what is equal is measured once.
        different = list(dict.fromkeys(candidates))
        measured: dict[float, list[float]] = {}
        with clock.span("masks"):
            cut = dict(zip(different, live.masks(score, different), strict=True))
            for ratio in different:
                with live.trial(cut[ratio]), clock.span("probe"):
                    measured[ratio] = self._costs(drawn, batches)
        losses = [measured[ratio] for ratio in candidates]
        self.forwards += len(drawn) * (len(different) + (baseline is not None))
        if self._discard:
            return
        self.controller, record = rounds.conclude(
            self.controller, self._config, candidates, baseline, losses, drawn, step
        )
        flipped = 0
        if record.committed and masked:
            with clock.span("masks"):
                wanted = cut.get(record.mask_ratio)
                if wanted is None:
                    (wanted,) = live.masks(score, [record.mask_ratio])
                cleared = optimizer if self._config.clear_moments else None
                flipped = live.commit(wanted, cleared)
        self.flipped.append(flipped)
        self._on_round(self.controller, record)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the generator and the history of the rounds."""
        tensors = {"generator": self._generator.get_state()}
        values = {
            "controller": rounds.state_to_json(self.controller),
            "flipped": self.flipped,
            "forwards": self.forwards,
        }
        return tensors, values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Take over a state; rounds after it are forgotten."""
        self._generator.set_state(tensors["generator"])
        self.controller = rounds.state_from_json(values["controller"])
        self.flipped = list(values["flipped"])
        self.forwards = int(values["forwards"])
