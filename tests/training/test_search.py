"""Rounds, best checkpoint and resuming, in the real Trainer with a tiny model."""

import dataclasses
import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from benchmarks.torture_damage import WAYS, damage
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.evidence.history import RoundRecord
from grasp_lora.core.lora import LoraFactors, merge
from grasp_lora.core.pruning.importance import IMPORTANCE, NEEDS_GRADIENTS
from grasp_lora.core.pruning.masks import pruned_count
from grasp_lora.core.pruning.profile import Profile, profile_ratios
from grasp_lora.models.example_losses import EncodedExamples, example_losses, losses_in_states
from grasp_lora.tasks.encoding import Collator, EncodedExample
from grasp_lora.training import best as best_module
from grasp_lora.training import search_callback as callback
from grasp_lora.training.best import BestCallback
from grasp_lora.training.checkpoint import (
    MARKER_FILE,
    CheckpointCallback,
    LiveAdapterState,
    complete_checkpoints,
    newest_whole,
)
from grasp_lora.training.gradients import GradientAverages
from grasp_lora.training.groups import SCOPES, slopes
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
    answer_loss,
    build_trainer,
    steps_per_epoch,
)
from helpers import tiny_model

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
COLLATE = Collator(pad_id=0)


class Crash(RuntimeError):
    pass


class CrashAt(TrainerCallback):
    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Crash


def encoded_rows(count: int, seed: int) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        length = int(torch.randint(6, 14, (1,), generator=generator))
        ids = tuple(torch.randint(1, 256, (length,), generator=generator).tolist())
        rows.append(EncodedExample(f"r{seed}-{i}", f"g{i // 2}", ids, length - 3, 0))
    return rows


def live_adapter(
    kind: str = "cat", dropout: float = 0.1, structure: str = "entries"
) -> LiveAdapter:
    model = tiny_model("llama")
    known = dict(model.named_modules())
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
    merged = merge(kind, adapters, [0.5, 0.5])
    return attach_live_adapter(model, merged, "source", dropout, structure=structure)


RECORD = RoundRecord(
    round=0,
    step=1,
    kind="policy",
    candidates=(0.2, 0.4),
    rewards=(0.1, 0.3),
    baseline=None,
    losses=(1.1, 0.9),
    committed=False,
    ratio_before=0.1,
    ratio=0.1,
    mask_ratio=0.1,
    best=0.4,
    mu=0.3,
    sigma=0.2,
    rows=(),
    per_row=(),
    baseline_rows=(),
    reason="",
)


@dataclasses.dataclass
class Run:
    live: LiveAdapter
    searcher: SearchCallback | None
    best: BestCallback
    log: list[dict]
    steps: int


class Discarding(SearchCallback):
    """A search whose probes change neither the masks nor the controller."""

    def _conclude(self, *_measured: Any) -> None:
        pass


def train(
    out: Path,
    *,
    crash_at: int | None = None,
    search: Literal["run", "discard", "none"] = "run",
    patience: int | None = None,
    epochs: int = 4,
    kind: str = "cat",
    config: ControllerConfig | None = None,
    importance: str = "magnitude",
    structure: str = "entries",
    tilted: bool = False,
    **settings: Any,
) -> Run:
    live = live_adapter(kind, structure=structure)
    gathered = [GradientAverages(live, importance)] if importance in NEEDS_GRADIENTS else []
    train_rows, probe_rows = encoded_rows(10, 1), encoded_rows(8, 2)
    config = config or ControllerConfig(rounds=4, rows=4, max_step=0.3)
    per_epoch = steps_per_epoch(10, 2, 2)
    total = epochs * per_epoch
    kind_of_search = Discarding if search == "discard" else SearchCallback
    searcher = kind_of_search(
        live,
        ProbePool(EncodedExamples(probe_rows, COLLATE, 3), fresh=True),
        SearchSettings(
            config,
            IMPORTANCE[importance],
            gathered[0].averages if gathered else None,
            seed=5,
            total_steps=total,
            planned_rounds=rounds.planned_rounds(total, config),
            slopes=slopes(live) if tilted else None,
        ),
        on_round=lambda _state, _record: None,
    )
    dev = EncodedExamples(encoded_rows(5, 3), COLLATE, 2)
    best = BestCallback(live, dev, per_epoch, patience, lambda _e: None)
    parts = [LiveAdapterState(live), best, *gathered]
    parts += [searcher] if search != "none" else []
    trainer = build_trainer(
        live.model,
        train_rows,
        COLLATE,
        [
            CheckpointCallback(parts),
            MaskCallback(live),
            *gathered,
            *([searcher] if search != "none" else []),
            best,
            CrashAt(crash_at),
        ],
        out,
        TrainerSettings(
            seed=3,
            epochs=epochs,
            max_steps=None,
            batch_size=2,
            accumulation=2,
            lr_decay=0.85,
            weight_decay=0.05,
            max_grad_norm=1.0,
            **({"learning_rate": 0.02, "save_every": 2} | settings),
        ),
    )
    checkpoint = next(iter(complete_checkpoints(out)), None)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    log = [e for e in trainer.state.log_history if "loss" in e]
    return Run(live, searcher if search != "none" else None, best, log, trainer.state.global_step)


def same_weights(a: LiveAdapter, b: LiveAdapter) -> bool:
    one, other = a.snapshot(), b.snapshot()
    return all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize(("baseline", "tilted"), [(False, False), (True, False), (False, True)])
def test_a_search_whose_probes_are_discarded_equals_plain_fine_tuning_bit_for_bit(
    tmp_path, baseline, tilted
):
    config = ControllerConfig(rounds=4, rows=4, max_step=0.3, baseline=baseline)
    probed = train(tmp_path / "a", search="discard", config=config, tilted=tilted)
    plain = train(tmp_path / "b", search="none")
    assert probed.searcher.forwards == 4 * 4 * (4 if baseline else 3)
    assert same_weights(probed.live, plain.live)
    assert [e["loss"] for e in probed.log] == [e["loss"] for e in plain.log]


@pytest.mark.parametrize("rule", ["taylor", "taylor-smoothed"])
def test_gathering_gradients_changes_no_training_and_survives_a_crash(tmp_path, rule):
    probed = train(tmp_path / "a", search="discard", importance=rule)
    plain = train(tmp_path / "b", search="none")
    assert same_weights(probed.live, plain.live)
    whole = train(tmp_path / "c", importance=rule)
    with pytest.raises(Crash):
        train(tmp_path / "d", importance=rule, crash_at=7)
    again = train(tmp_path / "d", importance=rule)
    assert again.searcher.controller == whole.searcher.controller
    assert same_weights(again.live, whole.live)
    magnitudes = train(tmp_path / "e")
    assert magnitudes.searcher.flipped != whole.searcher.flipped, "the rule is used"


def test_a_search_of_two_of_four_tries_and_keeps_the_ratios_there_are(tmp_path):
    run = train(tmp_path, config=ControllerConfig(rounds=4, rows=4, max_step=0.5), structure="2:4")
    records = run.searcher.controller.records
    assert {ratio for record in records for ratio in record.candidates} == {0.0, 0.5}
    assert run.searcher.forwards == sum(4 * len(set(record.candidates)) for record in records)
    last = [record for record in records if record.committed][-1]
    for block in run.live.blocks:
        keep = run.live.keep(block.a)[block.rows]
        share = 0.5 if last.mask_ratio >= 0.25 else 0.0
        assert float((~keep).float().mean()) == share
    assert run.searcher.choose().ratio in (0.0, 0.5)


class Tracker(TrainerCallback):
    """A tracker that keeps what it is given, as TensorBoard's would."""

    given: list[tuple[int, dict[str, float]]]

    def __init__(self):
        Tracker.given = []

    def on_log(self, args, state, control, logs, **kwargs):
        Tracker.given.append((state.global_step, dict(logs)))


def test_trackers_are_given_every_round_and_the_training_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "kept", Tracker)
    plain, run = train(tmp_path / "a"), train(tmp_path / "b", report_to=("kept",))
    records = run.searcher.controller.records
    rounds = [(step, one) for step, one in Tracker.given if "grasp/ratio" in one]
    assert [step for step, _ in rounds] == [record.step for record in records]
    for (_, one), record, flipped in zip(rounds, records, run.searcher.flipped, strict=True):
        best = record.candidates.index(record.best)
        assert {name: value for name, value in one.items() if name != "epoch"} == {
            "grasp/ratio": record.mask_ratio,
            "grasp/incumbent": record.ratio,
            "grasp/mu": record.mu,
            "grasp/sigma": record.sigma,
            "grasp/best": record.best,
            "grasp/reward": record.rewards[best],
            "grasp/loss": record.losses[best],
            "grasp/flipped": flipped,
        }
    assert [one["loss"] for _, one in Tracker.given if "loss" in one] == [
        entry["loss"] for entry in plain.log
    ]
    assert plain.log == run.log
    assert same_weights(plain.live, run.live)


def test_numbers_that_are_not_finite_are_left_out():
    record = dataclasses.replace(
        RECORD, candidates=(0.2, 0.4), rewards=(None, None), losses=(None, None), best=None
    )
    assert callback.scalars(record) == {
        "grasp/ratio": 0.1,
        "grasp/incumbent": 0.1,
        "grasp/mu": 0.3,
        "grasp/sigma": 0.2,
    }


def test_equal_candidates_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(callback.rounds, "propose", lambda *_: (0.0, 0.3, 0.0))
    run = train(tmp_path, config=ControllerConfig(rounds=3, rows=4))
    assert run.searcher.forwards == 3 * 4 * 2
    for record in run.searcher.controller.records:
        assert record.candidates == (0.0, 0.3, 0.0)
        assert record.per_row[0] == record.per_row[2] != record.per_row[1]


def test_rounds_fire_and_the_mask_is_cut_at_the_ratio_recorded(tmp_path):
    run = train(tmp_path, config=ControllerConfig(rounds=4, rows=4, max_step=0.05))
    records = run.searcher.controller.records
    assert len(records) == 4
    last = [r for r in records if r.committed][-1]
    assert all(abs(c - last.ratio) > 0.02 for c in last.candidates), "no candidate's mask will do"
    for name, param in run.live.params.items():
        assert torch.equal(param == 0, ~run.live.keep(name))
    for block in run.live.blocks:
        for keep in (run.live.keep(block.a)[block.rows], run.live.keep(block.b)[:, block.rows]):
            assert int((~keep).sum()) == pruned_count(keep.numel(), last.ratio)


def test_importance_is_computed_anew_in_every_round(tmp_path, monkeypatch):
    seen = []
    masks = LiveAdapter.masks

    def watched(self, score, ratios):
        blocks = self.effective_blocks()
        seen.append([t.clone() for block, a, b in blocks for t in score(block, a, b)])
        return masks(self, score, ratios)

    monkeypatch.setattr(LiveAdapter, "masks", watched)
    train(tmp_path, config=ControllerConfig(rounds=4, rows=4), learning_rate=0.1)
    assert len(seen) >= 4
    first, last = seen[0], seen[-1]
    assert any(not torch.equal(a, b) for a, b in zip(first, last, strict=True))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Return a function that gives the search of a kind of merge that was not stopped, run once."""
    return functools.cache(lambda kind: train(tmp_path_factory.mktemp("whole"), kind=kind))


@pytest.mark.parametrize("kind", ["cat", "linear"])
@pytest.mark.parametrize("crash_at", [3, 5, 7, 11])
def test_a_resumed_search_equals_an_uninterrupted_one(tmp_path, uninterrupted, crash_at, kind):
    whole = uninterrupted(kind)
    with pytest.raises(Crash):
        train(tmp_path / "parts", crash_at=crash_at, kind=kind)
    resumed = train(tmp_path / "parts", kind=kind)
    assert same_weights(whole.live, resumed.live)
    assert rounds.state_to_json(whole.searcher.controller) == rounds.state_to_json(
        resumed.searcher.controller
    )
    assert whole.best.evaluations == resumed.best.evaluations
    assert [e["loss"] for e in whole.log] == [e["loss"] for e in resumed.log]
    assert [e["learning_rate"] for e in whole.log] == [e["learning_rate"] for e in resumed.log]


def test_a_search_of_tilts_probes_ratios_of_groups_and_goes_on_the_same_after_a_crash(
    tmp_path, monkeypatch
):
    asked = []
    cut = LiveAdapter.masks

    def watched(self, score, ratios):
        asked.append([[r(b) if callable(r) else r for b in self.blocks] for r in ratios])
        return cut(self, score, ratios)

    monkeypatch.setattr(LiveAdapter, "masks", watched)
    whole = train(tmp_path / "whole", tilted=True)
    records = whole.searcher.controller.records
    assert [record.kind for record in records] == [*["coverage"] * 3, "confirmation"]
    ways = slopes(whole.live)
    assert ways.names == ("depth", "module", "adapter")
    groups = [SCOPES["policy"](block) for block in whole.live.blocks]
    probed = dict.fromkeys(tuple(each) for ratios in asked for each in ratios)
    for record in records:
        for level, tilts in zip(record.candidates, record.tilts, strict=True):
            ratios = profile_ratios(Profile(level, tilts), ways, 0.0, 0.8)
            expected = tuple(ratios[g] for g in groups) if any(tilts) else (level,) * len(groups)
            assert expected in probed
    assert any(len(set(each)) > 1 for each in probed)
    for crash_at in (5, 11):
        with pytest.raises(Crash):
            train(tmp_path / str(crash_at), tilted=True, crash_at=crash_at)
        resumed = train(tmp_path / str(crash_at), tilted=True)
        assert same_weights(whole.live, resumed.live)
        assert resumed.searcher.controller == whole.searcher.controller
        assert resumed.searcher.choose_profile() == whole.searcher.choose_profile()


def test_patience_survives_a_crash(tmp_path):
    settings = {"patience": 2, "learning_rate": 0.3, "epochs": 8, "search": False}
    whole = train(tmp_path / "whole", **settings)
    assert whole.steps < 8 * 3
    with pytest.raises(Crash):
        train(tmp_path / "parts", crash_at=whole.steps - 1, **settings)
    resumed = train(tmp_path / "parts", **settings)
    assert resumed.steps == whole.steps
    assert resumed.best.evaluations == whole.best.evaluations


def test_a_crash_at_the_end_of_an_epoch_keeps_its_evaluation(tmp_path):
    settings = {"save_every": 3, "search": False}
    whole = train(tmp_path / "whole", **settings)
    with pytest.raises(Crash):
        train(tmp_path / "parts", crash_at=4, **settings)
    resumed = train(tmp_path / "parts", **settings)
    assert [e.step for e in resumed.best.evaluations] == [0, 3, 6, 9, 12]
    assert resumed.best.evaluations == whole.best.evaluations


def test_step_0_wins_when_training_only_makes_it_worse(tmp_path, monkeypatch):
    worse = itertools.count(1.0)
    monkeypatch.setattr(
        best_module, "example_losses", lambda model, batches, count: [next(worse)] * count
    )
    run = train(tmp_path, search="none", patience=1)
    start = live_adapter()
    assert not same_weights(run.live, start)
    assert run.best.restore().step == 0
    assert same_weights(run.live, start)


def test_the_best_adapter_is_restored_with_its_masks(tmp_path):
    run = train(tmp_path)
    kept = run.best.restore()
    assert kept.loss == min(e.loss for e in run.best.evaluations)
    for name, param in run.live.params.items():
        assert (param[~run.live.keep(name)] == 0).all()


def test_rows_are_dealt_before_any_is_probed_again(tmp_path):
    run = train(tmp_path, config=ControllerConfig(rounds=4, rows=2, max_step=0.3))
    records = run.searcher.controller.records
    assert sorted(row for r in records for row in r.rows) == list(range(8))
    assert all(r.baseline is None and r.baseline_rows == () for r in records)


def test_an_incomplete_checkpoint_is_passed_over_and_removed(tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, crash_at=5)
    newest = complete_checkpoints(tmp_path)[0]
    assert newest.name == "checkpoint-4"
    (newest / MARKER_FILE).unlink()
    said = []
    assert newest_whole(tmp_path, said.append) == tmp_path / "checkpoint-2"
    assert not newest.exists()
    assert said == [], "a crash in the writing of a checkpoint is no damage"


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_checkpoint_is_never_gone_on_from(tmp_path, way):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with pytest.raises(Crash):
        train(whole, crash_at=5)
    names = [one.name for one in (whole / "checkpoint-4").iterdir()]
    assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"} <= {*names}
    for name in names:
        if name == MARKER_FILE and way == "gone":
            continue  # a checkpoint without a marker is incomplete
        shutil.copytree(whole, broken)
        damage(broken / "checkpoint-4" / name, way)
        said = []
        assert newest_whole(broken, said.append) == broken / "checkpoint-2"
        (line,) = said
        assert line.startswith(f"checkpoint-4 is damaged ('{name}' ")
        assert line.endswith("; going on from checkpoint-2")
        assert (broken / "damaged-checkpoint-4").is_dir()
        damage(broken / "checkpoint-2" / "optimizer.pt", way)
        assert newest_whole(broken, said.append) is None
        assert said[1].endswith("; no other is whole, so this begins again at the first step")
        shutil.rmtree(broken)


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from_unchecked(tmp_path):
    with pytest.raises(Crash):
        train(tmp_path, crash_at=5)
    marker = tmp_path / "checkpoint-4" / MARKER_FILE
    stored = json.loads(marker.read_text())
    marker.write_text(json.dumps({n: v for n, v in stored.items() if n not in ("files", "sha256")}))
    assert newest_whole(tmp_path, print) == tmp_path / "checkpoint-4"


def test_at_least_two_complete_checkpoints_are_kept(tmp_path):
    train(tmp_path)
    complete = [p for p in tmp_path.glob("checkpoint-*") if (p / MARKER_FILE).exists()]
    assert len(complete) >= 2


def test_resuming_from_a_folder_outside_the_run_fails_loudly(tmp_path):
    with pytest.raises(Crash):
        train(tmp_path / "a", crash_at=5)
    (complete_checkpoints(tmp_path / "a")[0] / MARKER_FILE).rename(tmp_path / "marker")
    callback = CheckpointCallback([])

    class State:
        global_step = 4

    class Args:
        output_dir = str(tmp_path / "a")

    with pytest.raises(ValueError, match="not a complete checkpoint"):
        callback.on_train_begin(Args(), State(), None)


def test_training_stops_at_a_nan_loss_before_the_optimizer_step(tmp_path):
    live = live_adapter()
    for param in live.params.values():
        param.data.fill_(float("nan"))
    trainer = build_trainer(
        live.model,
        encoded_rows(4, 1),
        COLLATE,
        [],
        tmp_path,
        TrainerSettings(
            seed=0,
            epochs=1,
            max_steps=None,
            batch_size=2,
            accumulation=1,
            learning_rate=0.1,
            lr_decay=1.0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            save_every=1,
        ),
    )
    with pytest.raises(Diverged, match="not finite"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_nan_candidate_loses_its_trial_and_nothing_else(tmp_path, monkeypatch):
    calls = {"n": 0}

    def sometimes_nan(model, states, batches, count):
        calls["n"] += 1
        losses = losses_in_states(model, states, batches, count)
        return [*losses[:-1], [float("nan")] * count] if calls["n"] == 1 else losses

    monkeypatch.setattr(callback, "losses_in_states", sometimes_nan)
    run = train(tmp_path)
    first = run.searcher.controller.records[0]
    assert sum(r is None for r in first.rewards) == 1
    assert len(run.searcher.controller.records) == 4
    json.dumps(dataclasses.asdict(first), allow_nan=False)


def test_row_losses_do_not_depend_on_the_batches():
    live = live_adapter(dropout=0.0)
    live.model.eval()
    rows = encoded_rows(7, 8)
    alone = [
        example_losses(live.model, EncodedExamples([r], COLLATE, 1).batches([0]), 1)[0]
        for r in rows
    ]
    for size in (1, 2, 3, 7):
        together = example_losses(
            live.model, EncodedExamples(rows, COLLATE, size).batches(range(7)), 7
        )
        assert together == pytest.approx(alone, abs=1e-5)


def test_row_loss_is_the_mean_over_answer_tokens():
    live = live_adapter(dropout=0.0)
    live.model.eval()
    row = encoded_rows(1, 4)[0]
    with torch.no_grad():
        logits = live.model(input_ids=torch.tensor([row.input_ids])).logits[0]
    log_probs = logits.log_softmax(-1)
    answer = range(row.prompt_length, len(row.input_ids))
    expected = -sum(float(log_probs[i - 1, row.input_ids[i]]) for i in answer) / len(answer)
    (got,) = example_losses(live.model, EncodedExamples([row], COLLATE, 1).batches([0]), 1)
    assert got == pytest.approx(expected, abs=1e-5)


def test_full_logits_give_the_same_loss_as_answer_logits():
    live = live_adapter(dropout=0.0)
    batch = COLLATE(encoded_rows(3, 6))
    labels = batch.pop("labels")
    kept = live.model.eval()(**batch)
    batch.pop("logits_to_keep")
    full = live.model(**batch)
    assert full.logits.shape[1] > kept.logits.shape[1]
    assert torch.allclose(answer_loss(full, labels), answer_loss(kept, labels), atol=1e-6)


def test_accumulated_batches_train_as_one_large_batch(tmp_path):
    def weights(batch_size: int, accumulation: int) -> torch.Tensor:
        live = live_adapter(dropout=0.0)
        trainer = build_trainer(
            live.model,
            encoded_rows(10, 1),
            COLLATE,
            [],
            tmp_path / f"{batch_size}-{accumulation}",
            TrainerSettings(
                seed=0,
                epochs=2,
                max_steps=None,
                batch_size=batch_size,
                accumulation=accumulation,
                learning_rate=0.01,
                lr_decay=0.85,
                weight_decay=0.0,
                max_grad_norm=1.0,
                save_every=100,
            ),
        )
        trainer.train()
        return torch.cat([p.detach().flatten() for p in live.params.values()])

    whole = weights(4, 1)
    assert torch.allclose(weights(2, 2), whole, atol=1e-5)
    assert torch.allclose(weights(1, 4), whole, atol=1e-5)


def test_the_learning_rate_falls_by_the_decay_after_each_epoch(tmp_path):
    run = train(tmp_path, search="none", learning_rate=0.02)
    rates = [e["learning_rate"] for e in run.log]
    per_epoch = steps_per_epoch(10, 2, 2)
    expected = [0.02 * 0.85 ** (step // per_epoch) for step in range(len(rates))]
    assert rates == pytest.approx(expected)
