"""The clock callbacks, with a clock that the test advances."""

import torch
from torch import nn
from transformers import TrainerCallback

from grasp_lora.base.clock import Clock, SpanTotals
from grasp_lora.training.clock_callbacks import SaveClock, StepClock
from grasp_lora.training.trainer import TrainerSettings, build_trainer
from hands import Hands
from helpers import tiny_model


class Row(dict):
    """An example as a dict, with the attribute that determines the order."""

    @property
    def input_ids(self) -> list[int]:
        return self["input_ids"]


ROWS = [Row(input_ids=list(range(1, 9)), labels=[-100] * 4 + [5, 6, 7, 8])] * 6


class Work(TrainerCallback):
    """Advances the clock by a second in each step, and by more outside steps."""

    def __init__(self, hands: Hands):
        self._hands = hands

    def on_optimizer_step(self, args, state, control, **kwargs):
        self._hands.pass_(1)

    def on_step_end(self, args, state, control, **kwargs):
        self._hands.pass_(10)

    def on_save(self, args, state, control, **kwargs):
        self._hands.pass_(100)


def train(folder, clock: Clock, hands: Hands, on_saved) -> None:
    model: nn.Module = tiny_model("llama")

    def collate(rows: list) -> dict:
        hands.pass_(1000)
        return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}

    build_trainer(
        model,
        ROWS,
        collate,
        [StepClock(clock), Work(hands), SaveClock(clock, on_saved)],
        folder,
        TrainerSettings(
            seed=0,
            epochs=2,
            max_steps=None,
            batch_size=1,
            accumulation=2,
            learning_rate=0.01,
            lr_decay=1.0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            save_every=3,
        ),
    ).train()


def test_steps_and_checkpoints_are_charged_and_other_callbacks_are_not(tmp_path):
    hands = Hands()
    clock, saves = Clock(now=hands), []
    with clock.stage("final"):
        train(tmp_path, clock, hands, lambda: saves.append(hands.time))
    found = clock.times()["final"]
    assert found["step"] == SpanTotals(6, 6)
    assert found["checkpoint"] == SpanTotals(200, 2)
    assert found["idle"].seconds == 12 * 1000 + 6 * 10, "batches and callbacks"
    assert len(saves) == 2
