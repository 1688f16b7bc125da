"""Rows beside the labelled ones: how many, which in which epoch, and the steps they take."""

import itertools
import json
from contextlib import suppress

import pytest
from transformers import TrainerCallback

from grasp_lora.config.run_config import make_config
from grasp_lora.stages.train import fresh_adapter
from grasp_lora.workbench.beside import (
    EXTRA,
    SOURCE,
    beside_target,
    read_beside,
    target_epoch,
    wanted_beside,
)
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.fit import FitOptions, epoch_steps, fit, run_steps
from helpers import rows_trained, tiny_backbone_folder
from jobs import TRAINED, job, write_rows

EPOCHS = 5
BATCH = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("beside")
    tiny_backbone_folder(folder / "base")
    write_rows(folder / "extra.jsonl", range(9), prefix="x")
    return folder


def opened(place, **extra):
    """Return a context with 8 train rows, 9 extra rows and 8 source rows."""
    values = job(place)
    values["data"]["extra"] = {"files": str(place / "extra.jsonl")} | extra
    return open_context(make_config(values), quiet=True)


class Killed(Exception):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Killed


def fitted(context, folder, monkeypatch, beside, kill_at=None, **changes):
    """Return (result, factors, ids read in training, lines said) of one training."""
    said = []
    monkeypatch.setattr(context.reporter, "say", said.append)
    training = context.config.training("finetune").model_copy(
        update={"epochs": EPOCHS, "batch_size": BATCH, "patience": None, "save_every": 1} | changes
    )
    callbacks = () if kill_at is None else (KillAt(kill_at),)
    options = FitOptions(training, "training", extra=callbacks, choose_best=False, beside=beside)
    fresh = fresh_adapter(context.backbone.model, context.config)
    with monkeypatch.context() as patch:
        read, result, factors = rows_trained(patch), None, {}
        with suppress(Killed), context.live(fresh, "merged") as live:
            result = fit(context, live, options, folder / "checkpoints")
            factors = {
                name: (a.clone(), b.clone()) for name, (a, b) in live.plain_factors().items()
            }
    return result, factors, [row.id for row in read], said


def ids(context, role, split):
    return [row.id for row in context.encoded(role, split)]


def epochs_of(read, size):
    assert len(read) % size == 0
    return [read[start : start + size] for start in range(0, len(read), size)]


def test_how_many_rows_an_epoch_reads_follows_the_weight():
    wanted = {(1.0, 8): 8, (0.5, 3): 2, (0.3, 50): 15, (0.1, 30): 3, (0.001, 8): 1, (2.5, 3): 8}
    for (weight, labelled), count in wanted.items():
        assert wanted_beside(weight, labelled) == count
    assert read_beside(2.0, 8, 100) == 16
    assert read_beside(2.0, 8, 9) == 9, "each is read once at most"


def test_the_sets_beside_are_those_given(place):
    context = opened(place, weight=0.5)
    assert beside_target(context.config) == {EXTRA: 0.5}
    assert beside_target(context.config, joint=True) == {EXTRA: 0.5, SOURCE: 1.0}
    assert beside_target(make_config(job(place))) == {}
    assert target_epoch(context.config, context.data) == TRAINED + 4
    assert target_epoch(make_config(job(place)), context.data) == TRAINED


def test_every_epoch_reads_all_labelled_rows_and_other_rows_beside_them(
    place, tmp_path, monkeypatch
):
    context = opened(place, weight=0.5)
    _, _, read, said = fitted(context, tmp_path, monkeypatch, {EXTRA: 0.5})
    labelled, extra = (ids(context, role, "train") for role in ("target", "extra"))
    epochs = epochs_of(read, TRAINED + 4)
    assert len(epochs) == EPOCHS
    turns = []
    for epoch in epochs:
        assert sorted(i for i in epoch if i in labelled) == sorted(labelled)
        turns.append([i for i in epoch if i in extra])
        assert len(set(turns[-1])) == 4
    # 5 epochs of 4 go through all 9 twice, and on to the third pass.
    counts = [sum(i in turn for turn in turns) for i in extra]
    assert sorted(counts) == [2] * 7 + [3] * 2
    assert len(set(turns[0]) | set(turns[1])) == 8
    assert not any("beside" in line for line in said)
    assert len({tuple(i in labelled for i in epoch) for epoch in epochs}) > 1, "they are mixed"


def test_the_steps_and_the_learning_rate_follow_the_longer_epochs(place, tmp_path, monkeypatch):
    context = opened(place)
    result, *_ = fitted(context, tmp_path, monkeypatch, {EXTRA: 1.0})
    training = context.config.training("finetune").model_copy(update={"batch_size": BATCH})
    assert epoch_steps(context, training, "target", {EXTRA: 1.0}) == 6, "16 rows by threes"
    assert epoch_steps(context, training, "target", {}) == 3
    whole = training.model_copy(update={"epochs": EPOCHS})
    assert run_steps(context, whole, "target", {EXTRA: 1.0}) == result.steps == 6 * EPOCHS
    rates = [entry["learning_rate"] for entry in result.log]
    assert rates == pytest.approx([1e-4 * 0.85 ** (step // 6) for step in range(6 * EPOCHS)])


@pytest.mark.parametrize("order", ["by-step", "by-length"])
def test_a_resumed_training_reads_the_rows_that_the_whole_one_reads(
    place, tmp_path, monkeypatch, order
):
    context, beside = opened(place, weight=0.5), {EXTRA: 0.5, SOURCE: 0.25}
    size, kill_at = TRAINED + 4 + 2, 12  # of 5 steps an epoch, so within the third
    _, factors, read, _ = fitted(context, tmp_path / "a", monkeypatch, beside, order=order)
    (tmp_path / "b").mkdir()
    fitted(context, tmp_path / "b", monkeypatch, beside, kill_at, order=order)
    _, again, rest, said = fitted(context, tmp_path / "b", monkeypatch, beside, order=order)
    assert any("resuming from checkpoint-11" in line for line in said)
    assert rest == read[2 * size + BATCH :], "the third epoch goes on after its first step"
    for name, pair in factors.items():
        assert all((one == other).all() for one, other in zip(pair, again[name], strict=True))


def test_too_few_rows_are_each_read_once_an_epoch_and_told(place, tmp_path, monkeypatch):
    context = opened(place, weight=3.0)
    _, _, read, said = fitted(context, tmp_path, monkeypatch, {EXTRA: 3.0})
    everything = sorted(ids(context, "target", "train") + ids(context, "extra", "train"))
    assert all(sorted(epoch) == everything for epoch in epochs_of(read, TRAINED + 9))
    assert [line for line in said if "beside" in line] == [
        "training: extra train has 9 rows of the 24 that an epoch should read beside 8 labelled "
        "rows; it reads all of them, once"
    ]


def test_dev_rows_are_measured_without_rows_beside_them(place):
    context = opened(place)
    for split in ("dev", "micro_dev", "test"):
        assert not set(ids(context, "target", split)) & set(ids(context, "extra", "train"))
    assert [row.id for row in context.rows("target", ["train"]).encoded] == ids(
        context, "target", "train"
    ), "norms and probes read labelled rows"


def test_a_fold_is_not_judged_by_rows_that_stand_beside_it(place, tmp_path):
    """Extra rows may have the context of a train row, and a fold may hold that row back."""
    context = opened(place)
    train, dev = (context.data.parts["target"][split] for split in ("train", "dev"))
    held = train[0]
    extra = [
        {"id": held.id, **held.fields, "answers": list(held.references)},
        {"id": "like", **held.fields, "question": "Another one?", "answers": list(held.references)},
        *(json.loads(line) for line in (place / "extra.jsonl").read_text().splitlines()),
    ]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in extra))
    values = job(place)
    values["data"]["extra"] = {"files": str(tmp_path / "more.jsonl")}
    context = open_context(make_config(values), quiet=True)
    assert {held.id, "like"} < set(ids(context, "extra", "train"))
    rest = tuple(itertools.chain(train[1:], dev))
    fold = context.on_target({"train": rest, "dev": (held,)})
    assert ids(fold, "extra", "train") == [f"x{n}" for n in range(9)]
    whole = context.on_target({"train": (held, *rest)})
    assert whole.encoded("extra", "train") is context.encoded("extra", "train"), "read once"
    assert {held.id, "like"} < set(ids(context.on_all_labels(), "extra", "train"))
