"""The work of the published search and final run, emulated in our code, unit by unit.

What is emulated is what costs time, as the published code does it: batches of one; logits of every
position, from a float32 backbone; every candidate made by cloning all adapter tensors and undone by
copying all of them back; masks by k-th value; in the final run the whole train set is read again,
row by row, for the input norms after every optimizer step. The adapters are those of our own side.
A whole run of it takes hours on a CPU: units are measured and multiplied by the schedule's counts.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.lora import MergedModule
from grasp_lora.core.pruning.importance import activation, magnitude
from grasp_lora.models.backbones import Backbone
from grasp_lora.tasks.encoding import IGNORED, EncodedExample
from grasp_lora.training.activations import input_norms
from grasp_lora.training.live import attach_live_adapter

ACCUMULATION = 8
RATIO = 0.4
CANDIDATES = (0.3, 0.4, 0.5)

Scores = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Schedule:
    """The published schedule on so many rows.

    Attributes:
        train: training rows.
        dev: dev rows, read after every epoch of the final run.
        epochs: of the search and of the final run.
    """

    train: int
    dev: int
    epochs: int

    def counts(self) -> dict[str, int]:
        """Return how often each unit occurs in a search and a final run."""
        interval = ControllerConfig(preset="paper").interval
        assert interval is not None
        examples = self.train * self.epochs
        return {
            "search example": examples,
            "round": examples // interval,
            "final example": examples,
            "final update": math.ceil(self.train / ACCUMULATION) * self.epochs,
            "dev row": self.dev * self.epochs,
        }


class AuthorsSchedule:
    """The units, each a call without arguments.

    Args:
        backbone: in float32; gets an adapter attached.
        merged: the merged adapter.
        train: training rows.
        micro_dev: probing rows of a round.
        dev: dev rows.
    """

    def __init__(
        self,
        backbone: Backbone,
        merged: Mapping[str, MergedModule],
        train: Sequence[EncodedExample],
        micro_dev: Sequence[EncodedExample],
        dev: Sequence[EncodedExample],
    ):
        self._live = attach_live_adapter(backbone.model, merged, "source")
        self._train = [_batch(row, backbone.device) for row in train]
        self._micro_dev = [_batch(row, backbone.device) for row in micro_dev]
        self._dev = [_batch(row, backbone.device) for row in dev]
        self._next_train = cycle(self._train)
        self._next_dev = cycle(self._dev)
        self._optimizer = torch.optim.AdamW(self._live.params.values(), lr=1e-4)
        self._masks = {n: torch.ones_like(p) for n, p in self._live.params.items()}

    def units(self) -> dict[str, Callable[[], object]]:
        """Return name -> the unit, under the names of `Schedule.counts`."""
        return {
            "search example": self.search_example,
            "round": self.round,
            "final example": self.final_example,
            "final update": self.final_update,
            "dev row": self.dev_row,
        }

    def search_example(self) -> None:
        """Train on one row and step: the search does not accumulate."""
        self.final_example()
        self._step()

    @torch.no_grad()
    def round(self) -> None:
        """Read the micro-dev rows as the adapter is and under every candidate; cut one mask."""
        live = self._live
        live.model.eval()
        self._micro_dev_loss()
        for ratio in CANDIDATES:
            saved = {n: p.detach().clone() for n, p in live.params.items()}
            self._cut(magnitude, None, ratio)
            self._micro_dev_loss()
            for name, param in live.params.items():
                param.copy_(saved[name])
        self._cut(magnitude, None, RATIO)
        live.model.train()

    def final_example(self) -> None:
        """Read one training row and add its gradient."""
        self._loss(next(self._next_train)).backward()

    def final_update(self) -> None:
        """Step, then choose the mask anew from the activations of the whole train set."""
        self._step()
        inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in self._train]
        norms = input_norms(self._live.model, self._live.layers, inputs)
        self._cut(activation, norms, RATIO)

    @torch.no_grad()
    def dev_row(self) -> None:
        """Take the loss of one dev row."""
        self._loss(next(self._next_dev))

    def remove(self) -> None:
        """Take the adapter off the backbone."""
        self._live.model.unload()  # type: ignore[operator]

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self._live.model(**batch, use_cache=False).loss

    def _micro_dev_loss(self) -> float:
        losses = [self._loss(batch).item() for batch in self._micro_dev]
        return sum(losses) / len(losses)

    def _step(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()
        with torch.no_grad():
            for name, param in self._live.params.items():
                param.mul_(self._masks[name])

    @torch.no_grad()
    def _cut(self, score: Scores, norms: Mapping[str, Tensor] | None, ratio: float) -> None:
        for part, mask, scores in self._scored(score, norms):
            mask.copy_(scores > _threshold(scores, ratio))
            part.mul_(mask)

    def _scored(
        self, score: Scores, norms: Mapping[str, Tensor] | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (part of a tensor, its mask, its scores), both views of the whole."""
        for block in self._live.blocks:
            rows, names = block.rows, (block.a, block.b)
            a, b = (self._live.params[name] for name in names)
            mask_a, mask_b = (self._masks[name] for name in names)
            norm = None if norms is None else norms[block.module].to(a.device)
            score_a, score_b = score(a[rows], b[:, rows], norm)
            yield a[rows], mask_a[rows], score_a
            yield b[:, rows], mask_b[:, rows], score_b


def _threshold(scores: Tensor, ratio: float) -> Tensor:
    flat = scores.flatten()
    return flat.kthvalue(max(1, int(ratio * flat.numel()))).values


def _batch(row: EncodedExample, device: torch.device) -> dict[str, Any]:
    ids = torch.tensor([row.input_ids], device=device)
    labels = ids.clone()
    labels[:, : row.prompt_length] = IGNORED
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
