"""Averages of gradients over optimizer steps, for the importances of the first order."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, distributed
from transformers import TrainerCallback

from grasp_lora.models.example_losses import IGNORED
from grasp_lora.models.preserve import preserved
from grasp_lora.training.activations import Batch
from grasp_lora.training.live import LiveAdapter
from grasp_lora.training.trainer import answer_loss

BETA = 0.85
"""Share of an average that a step leaves as it is; that of AdaLoRA (arXiv 2303.10512)."""


class GradientAverages(TrainerCallback):
    """Gathers what an importance of the first order needs from the backward passes of a training.

    The gradients are those of a whole optimizer step, before clipping, of pruned entries too, at
    the weights that they were taken at. A pruned entry counts with the value it had when it was
    pruned. Nothing is computed twice: a hook sees the gradients pass.

    Args:
        live: the adapter.
        rule: `taylor` averages the gradient; `taylor-smoothed` the sensitivity |w dL/dw| and its
            distance from that average.

    Attributes:
        averages: name of a parameter -> its average, in the shape of the parameter, or for
            `taylor-smoothed` [2, ...]: sensitivity and uncertainty. A parameter that has had no
            gradient is missing.
    """

    name = "gradients"

    def __init__(self, live: LiveAdapter, rule: str):
        self._live = live
        self._smoothed = rule == "taylor-smoothed"
        self._step: dict[str, Tensor] = {}
        self.averages: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Watch the gradients from now on."""
        self._step = {}
        self._live.watch_gradients(self._see)

    def end(self) -> None:
        """Watch the gradients no longer."""
        self._live.watch_gradients(None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the gradients from now on."""
        self.begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gradients of the step into the averages."""
        self.count_step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Watch the gradients no longer."""
        self.end()

    def _see(self, name: str, gradient: Tensor) -> None:
        before = self._step.get(name)
        found = gradient.detach().float()
        self._step[name] = found.clone() if before is None else before + found

    @torch.no_grad()
    def count_step(self) -> None:
        """Take the gradients seen since the last step into the averages."""
        for name, gradient in self._of_all_processes().items():
            old = self.averages.get(name)
            if not self._smoothed:
                old = torch.zeros_like(gradient) if old is None else old
                self.averages[name] = BETA * old + (1 - BETA) * gradient
                continue
            old = torch.zeros(2, *gradient.shape, device=gradient.device) if old is None else old
            sensitivity = (self._live.effective(name).float() * gradient).abs()
            smooth = BETA * old[0] + (1 - BETA) * sensitivity
            uncertain = BETA * old[1] + (1 - BETA) * (sensitivity - smooth).abs()
            self.averages[name] = torch.stack([smooth, uncertain])
        self._step = {}

    def _of_all_processes(self) -> dict[str, Tensor]:
        """Return the gradients of the step, their mean where several processes train."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return self._step
        found: dict[str, Tensor] = {}
        for name, param in self._live.params.items():
            # Every process takes part, also one whose examples gave a tensor no gradient.
            one = self._step.get(name, torch.zeros_like(param, dtype=torch.float32))
            distributed.all_reduce(one)
            found[name] = one / distributed.get_world_size()
        return found

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the averages."""
        return {name: one.cpu() for name, one in self.averages.items()}, {}

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Load averages that `state` returned."""
        del values
        self.averages.clear()
        for name, one in tensors.items():
            self.averages[name] = one.to(self._live.params[name].device)


def averages_over(
    live: LiveAdapter, rule: str, steps: Iterable[Sequence[Batch]]
) -> dict[str, Tensor]:
    """Return `GradientAverages.averages` of one pass over the batches of steps.

    Nothing is trained. The model runs in eval mode; gradients, modes and random generators are as
    they were afterwards.

    Args:
        live: the adapter.
        rule: as in `GradientAverages`.
        steps: collated batches with labels, which are read one after the other; the loss of a step
            is the mean over the answer tokens of all its batches.
    """
    found, device = GradientAverages(live, rule), next(iter(live.params.values())).device
    with preserved(live.model, live.params), torch.enable_grad():
        live.model.eval()
        found.begin()
        try:
            for batches in steps:
                tokens = sum(int((batch["labels"] != IGNORED).sum()) for batch in batches)
                for batch in batches:
                    moved = {key: value.to(device) for key, value in batch.items()}
                    labels = moved.pop("labels")
                    answer_loss(live.model(**moved), labels, tokens).backward()
                found.count_step()
        finally:
            found.end()
    return found.averages
