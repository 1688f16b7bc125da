"""Two and four processes train, search and end as one process does, on the CPU."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from gloo import together
from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.rounds import RatioChoice
from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.lora import LoraFactors, merge
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.models.example_losses import EncodedExamples
from grasp_lora.models.shards import shard
from grasp_lora.tasks.encoding import Collator, EncodedExample
from grasp_lora.training.best import BestCallback
from grasp_lora.training.checkpoint import CheckpointCallback, LiveAdapterState, newest_whole
from grasp_lora.training.live import LiveAdapter, attach_live_adapter
from grasp_lora.training.search_callback import (
    MaskCallback,
    ProbePool,
    SearchCallback,
    SearchSettings,
)
from grasp_lora.training.trainer import (
    Diverged,
    TrainerSettings,
    build_trainer,
    counted_as,
    processes,
    share_of_step,
    steps_per_epoch,
)
from helpers import tiny_model

COLLATE = Collator(pad_id=0)
MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
ROWS, PER_STEP, EPOCHS = 11, 4, 3
"""The last step of an epoch has three rows, which neither two nor four processes can share."""


def encoded_rows(count: int, seed: int) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(6, 14, (1,), generator=generator))
        ids = tuple(torch.randint(1, 256, (length,), generator=generator).tolist())
        rows.append(EncodedExample(f"r{seed}-{i}", f"g{i // 2}", ids, length - 3, 0))
    return rows


def live_adapter(sharded: bool) -> LiveAdapter:
    model = tiny_model("llama")
    known: dict[str, Any] = dict(model.named_modules())
    if sharded:
        model.requires_grad_(False)
        shard(model, torch.device("cpu"))
    adapters = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        adapters.append(
            {
                n: LoraFactors(
                    torch.randn(3, known[n].in_features, generator=generator) * 0.3,
                    torch.randn(known[n].out_features, 3, generator=generator) * 0.3,
                    1.0,
                )
                for n in MODULES
            }
        )
    # Each process draws its own dropout, so there is none here.
    return attach_live_adapter(model, merge("cat", adapters, [0.5, 0.5]), "source", dropout=0.0)


class Stop(TrainerCallback):
    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


@dataclasses.dataclass
class Found:
    """What one process found."""

    losses: list[float]
    probed: list[Any]
    choice: RatioChoice
    dev: list[float]
    masks: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    forwards: int


def train(
    out: Path,
    stop: int | None = None,
    poisoned: int | None = None,
    begun: int | None = None,
    sharded: bool = False,
) -> Found:
    """Search and train with `PER_STEP` rows a step, whatever the number of processes.

    Args:
        out: folder of the checkpoints; the newest one is resumed from.
        stop: step after which the training ends early.
        poisoned: a token that makes the model's logits NaN.
        begun: processes that the training was begun with, if not these.
        sharded: cut the backbone into shards, which the processes keep between them.
    """
    with counted_as(begun):
        return _trained(live_adapter(sharded), out, stop, poisoned)


def _trained(live: LiveAdapter, out: Path, stop: int | None, poisoned: int | None) -> Found:
    if poisoned is not None:
        model: Any = live.model
        model.get_input_embeddings().weight[poisoned] = torch.nan
    total = EPOCHS * steps_per_epoch(ROWS, PER_STEP, 1)
    config = ControllerConfig(rounds=4, rows=6, max_step=0.3)
    searcher = SearchCallback(
        live,
        ProbePool(EncodedExamples(encoded_rows(8, 2), COLLATE, 3), fresh=True),
        SearchSettings(
            config,
            IMPORTANCE["magnitude"],
            None,
            seed=5,
            total_steps=total,
            planned_rounds=rounds.planned_rounds(total, config),
        ),
        on_round=lambda _state, _record: None,
    )
    dev = EncodedExamples(encoded_rows(5, 3), COLLATE, 2)
    best = BestCallback(live, dev, total // EPOCHS, None, lambda _e: None)
    parts = [LiveAdapterState(live), best, searcher]
    batch_size = 1 if processes() > 1 else 2
    trainer = build_trainer(
        live.model,
        encoded_rows(ROWS, 1),
        COLLATE,
        [CheckpointCallback(parts), MaskCallback(live), searcher, best, Stop(stop)],
        out,
        TrainerSettings(
            seed=3,
            epochs=EPOCHS,
            max_steps=None,
            batch_size=batch_size,
            accumulation=PER_STEP // batch_size // processes(),
            learning_rate=0.02,
            lr_decay=0.85,
            weight_decay=0.05,
            max_grad_norm=1.0,
            save_every=2,
        ),
    )
    newest = newest_whole(out, print)
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    return Found(
        [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        [(r.candidates, r.rows, r.per_row, r.baseline_rows) for r in searcher.controller.records],
        searcher.choose(),
        [evaluation.loss for evaluation in best.evaluations],
        {name: live.keep(name) for name in live.params},
        {name: param.detach().clone() for name, param in live.params.items()},
        searcher.forwards,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Found:
    """What one process finds."""
    return train(tmp_path_factory.mktemp("alone"))


def assert_same(one: Found, other: Found) -> None:
    assert other.losses == pytest.approx(one.losses, abs=1e-5)
    assert other.dev == pytest.approx(one.dev, abs=1e-5)
    assert other.forwards == one.forwards
    for mine, its in zip(one.probed, other.probed, strict=True):
        assert its[:2] == mine[:2], "the same candidates, measured on the same examples"
        for a, b in zip(mine[2], its[2], strict=True):
            assert b == pytest.approx(a, abs=1e-5)
        assert its[3] == pytest.approx(mine[3], abs=1e-5)
    assert (other.choice.ratio, other.choice.verdict) == (one.choice.ratio, one.choice.verdict)
    for name, mask in one.masks.items():
        assert torch.equal(other.masks[name], mask), name
        assert torch.allclose(other.weights[name], one.weights[name], atol=1e-5), name


@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_find_what_one_finds(alone, tmp_path, size):
    found = together(size, train, tmp_path)
    for one in found:
        assert isinstance(one, Found), one
        assert_same(alone, one)


def held(out: Path) -> tuple[Found, int, int, bool]:
    """Return what a training in shards finds, and the entries that this process held of the layers.

    Also those there are, and whether every LoRA factor was whole.
    """
    live = live_adapter(sharded=True)
    found = _trained(live, out, None, None)
    frozen = [p for p in live.model.parameters() if not p.requires_grad and p.numel() > 1]
    kept = sum(p.to_local().numel() for p in frozen if isinstance(p, DTensor))
    whole = all(type(p) is torch.nn.Parameter for p in live.params.values())
    return found, kept, sum(p.numel() for p in frozen), whole


@pytest.mark.parametrize("size", [2, 4])
def test_a_backbone_in_shards_gives_what_a_whole_one_gives(alone, tmp_path, size):
    for one in together(size, held, tmp_path):
        assert isinstance(one, tuple), one
        found, kept, there, whole = one
        assert_same(alone, found)
        assert whole
        assert kept == pytest.approx(there / size, rel=0.05)


def test_a_training_in_shards_goes_on_with_a_whole_backbone(alone, tmp_path):
    before = together(2, train, tmp_path, 4, None, None, True)
    assert [len(one.losses) for one in before] == [4, 4]
    (one,) = together(1, train, tmp_path, None, None, 2)
    assert isinstance(one, Found), one
    assert_same(alone, one)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4)])
def test_another_number_of_processes_goes_on_from_a_checkpoint(alone, tmp_path, before, after):
    (first, *_) = together(before, train, tmp_path, 4)
    assert [len(first.losses), len(first.probed)] == [4, 2], "stopped after half the rounds"
    for one in together(after, train, tmp_path, None, None, before):
        assert isinstance(one, Found), one
        assert_same(alone, one)


def test_processes_that_cannot_share_a_step_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert share_of_step(2, 2) == (2, 2), "nothing was begun with another number"
    with counted_as(2):
        assert processes() == 2
        assert share_of_step(2, 3) == (2, 2), "12 rows: 4 for each, at most 2 in a forward"
        assert share_of_step(3, 1) == (2, 1)
        with pytest.raises(
            ValueError, match=r"have 8 examples; 3 processes cannot.*\[1, 2, 4, 8\]"
        ):
            share_of_step(2, 2)
    assert processes() == 3


def test_what_diverges_in_one_process_ends_all_with_the_same_words(tmp_path):
    own = {token for row in encoded_rows(ROWS, 1)[:1] for token in row.input_ids}
    rest = [*encoded_rows(ROWS, 1)[1:], *encoded_rows(8, 2), *encoded_rows(5, 3)]
    poisoned = min(own - {token for row in rest for token in row.input_ids})
    found = together(2, train, tmp_path / "two", None, poisoned, seconds=60)
    with pytest.raises(Diverged) as alone:
        train(tmp_path / "one", poisoned=poisoned)
    assert [type(one) for one in found] == [Diverged, Diverged], found
    said = "training loss is nan; the model's own logits are not finite"
    assert {str(one) for one in found} == {str(alone.value)} == {said}
