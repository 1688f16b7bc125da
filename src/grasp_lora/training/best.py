"""Keep the adapter with the lowest dev loss, step 0 included, and stop early."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from grasp_lora.base.clock import Clock
from grasp_lora.models.example_losses import EncodedExamples, example_losses
from grasp_lora.models.preserve import preserved
from grasp_lora.training.live import LiveAdapter


@dataclass(frozen=True)
class Evaluation:
    """Dev loss at one step, in nats: mean over examples of the mean over answer tokens."""

    step: int
    loss: float


class BestCallback(TrainerCallback):
    """Measures the dev loss before the first step and after every epoch; keeps the best adapter.

    Step 0 counts: if training only increases the dev loss, the initial adapter is the best one.
    Training stops after `patience` consecutive evaluations without a new best.

    Args:
        live: the adapter.
        examples: the dev examples.
        every: optimizer steps per epoch.
        patience: evaluations without a new best before training stops; None never stops.
        on_evaluation: called with every evaluation.
        clock: measures the seconds of the evaluations, as `dev`.
        unpruned: evaluate with nothing pruned, for masks that change between evaluations.
    """

    name = "best"

    def __init__(
        self,
        live: LiveAdapter,
        examples: EncodedExamples,
        every: int,
        patience: int | None,
        on_evaluation: Callable[[Evaluation], None],
        clock: Clock | None = None,
        unpruned: bool = False,
    ):
        self._live = live
        self._unpruned = unpruned
        self._batches = examples.batches(range(len(examples.encoded)))
        self._count = len(examples.encoded)
        self._every = every
        self._patience = patience
        self._on_evaluation = on_evaluation
        self._clock = clock or Clock()
        self._best: dict[str, Tensor] = {}
        self.evaluations: list[Evaluation] = []
        self.example_losses: list[list[float]] = []
        """For each evaluation, the loss of every dev example in nats."""
        self.best: Evaluation | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the initial adapter, unless the run resumes from a checkpoint."""
        if state.global_step == 0:
            with self._clock.span("dev"):
                self._evaluate(0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate after each epoch and at the end of the run; stop when patience has run out."""
        # on_epoch_end comes too late: the checkpoint of an epoch's last step is written before it,
        # so a run resumed from that checkpoint would miss the evaluation.
        step = state.global_step
        if not self.out_of_patience() and (step % self._every == 0 or step == state.max_steps):
            with self._clock.span("dev"):
                self._evaluate(step)
        if self.out_of_patience():
            control.should_training_stop = True

    def out_of_patience(self) -> bool:
        """Return whether the last `patience` evaluations gave no new best."""
        if self._patience is None or self.best is None:
            return False
        steps = [e.step for e in self.evaluations]
        return len(steps) - 1 - steps.index(self.best.step) >= self._patience

    def _evaluate(self, step: int) -> None:
        live = self._live
        with live.unpruned() if self._unpruned else preserved(live.model, live.params):
            live.model.eval()
            losses = example_losses(live.model, self._batches, self._count)
        evaluation = Evaluation(step, sum(losses) / len(losses))
        self.evaluations.append(evaluation)
        self.example_losses.append(losses)
        if self.best is None or _better(evaluation.loss, self.best.loss):
            self.best = evaluation
            self._best = live.snapshot()
        self._on_evaluation(evaluation)

    def restore(self) -> Evaluation:
        """Load the best adapter into the model and return its evaluation."""
        assert self.best is not None
        self._live.load(self._best)
        return self.best

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the best adapter's tensors, and all evaluations."""
        values: dict[str, Any] = {"evaluations": [asdict(e) for e in self.evaluations]}
        values["rows"] = self.example_losses
        if self.best is not None:
            values["best"] = asdict(self.best)
        return dict(self._best), values

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Load a state. Patience follows from the evaluations in it."""
        self._best = dict(tensors)
        self.evaluations = [Evaluation(**e) for e in values["evaluations"]]
        self.best = Evaluation(**values["best"]) if "best" in values else None
        self.example_losses = [list(losses) for losses in values["rows"]]


def _better(loss: float, best: float) -> bool:
    # No loss is at least a best that is NaN, so every finite one replaces it.
    return math.isfinite(loss) and not loss >= best
