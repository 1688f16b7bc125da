"""What the controller costs beside the same fine-tuning without it, in time and in memory.

    OMP_NUM_THREADS=2 python -m benchmarks.search --json search.json

One process holds both sides, each a real Trainer on its own copy of the backbone's modules (the
weights are shared), in a thread of its own; only the thread that holds the baton runs. They take
turns step by step at full length, and who goes first changes with every step. A round belongs to
the step it follows.

JSON: `search_overhead`, the extra seconds over those of the plain fine-tuning, from medians: of a
plain step, of what a step without a round takes longer under masks, of a round, of the input norms.
`search_overhead_totals` is the same from plain sums. `split` says where the extra time goes; `rest`
is what the parts of the rounds do not explain, and may be a little below 0 for that reason.
`published_schedule` is computed from the measured costs, not run. `memory_ratio` compares the
largest resident memory of a search process and of a plain one, counted after the backbone is
loaded, where the system can do that (on CUDA: the largest allocated memory).
"""

import argparse
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from benchmarks import common
from grasp_lora.base.clock import Clock
from grasp_lora.core.controller.rounds import planned_rounds
from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.pruning.importance import IMPORTANCE, NEEDS_NORMS
from grasp_lora.models.backbones import Backbone
from grasp_lora.models.example_losses import EncodedExamples
from grasp_lora.models.modules import bare_model
from grasp_lora.tasks.encoding import EncodedExample
from grasp_lora.training.activations import input_norms
from grasp_lora.training.live import LiveAdapter, attach_live_adapter
from grasp_lora.training.search_callback import (
    MaskCallback,
    ProbePool,
    SearchCallback,
    SearchSettings,
)
from grasp_lora.training.trainer import TrainerSettings, build_trainer, planned_steps

PARTS = ("baseline", "probe", "masks")
TARGETS = ("q_proj", "v_proj")
MEMORY_STEPS, MEMORY_ROUNDS = 8, 3
"""Of the runs that memory is measured in: masks are committed and probed under again."""


@dataclass(frozen=True)
class Sizes:
    """What is trained and probed.

    Attributes:
        rows: training rows.
        epochs: passes over them.
        batch_size: rows per optimizer step.
        length: tokens of every row.
        pool: rows that a round draws its probing rows from.
        rank: of each of the two adapters.
        probe_batch: most probing rows per forward.
        importance: the rule that masks follow.
        controller: the controller's settings.
    """

    rows: int = 50
    epochs: int = 10
    batch_size: int = 4
    length: int = 256
    pool: int = 66
    rank: int = 8
    probe_batch: int = 16
    importance: str = "activation"
    controller: ControllerConfig = field(default_factory=ControllerConfig)

    @property
    def steps(self) -> int:
        """The optimizer steps of a run."""
        return planned_steps(self.rows, self.epochs, self.batch_size, 1, None)


QUICK = Sizes(
    rows=8,
    epochs=2,
    length=16,
    pool=8,
    rank=2,
    controller=ControllerConfig(rounds=2, rows=4, candidates=2),
)


class Meter:
    """Counts the rows and tokens a model reads; padding counts, as it costs as much.

    Args:
        model: any model with an input embedding, through which every read goes.
    """

    def __init__(self, model: nn.Module):
        self.counts = {"train": {"rows": 0, "tokens": 0}, "probe": {"rows": 0, "tokens": 0}}
        embedding = bare_model(model).get_input_embeddings()  # type: ignore[operator]
        self._handle = embedding.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        del module
        found = self.counts["train" if torch.is_grad_enabled() else "probe"]
        found["rows"] += inputs[0].shape[0]
        found["tokens"] += inputs[0].numel()

    def remove(self) -> None:
        """Stop counting."""
        self._handle.remove()


@dataclass
class Side:
    """One of the two things compared, ready to train.

    Attributes:
        trainer: its Trainer.
        live: its adapter.
        searcher: the controller, None where there is none.
    """

    trainer: Trainer
    live: LiveAdapter
    searcher: SearchCallback | None = None


def training_rows(backbone: Backbone, sizes: Sizes, data: str | None) -> list[EncodedExample]:
    """Return the rows to train on: synthetic ones, or those of a file."""
    if data is None:
        return common.synthetic_rows(backbone, sizes.rows, sizes.length)
    return common.question_rows(backbone, sizes.rows, sizes.length, data)


def plain_side(
    model: nn.Module,
    backbone: Backbone,
    sizes: Sizes,
    out: Path,
    callbacks: Sequence[TrainerCallback] = (),
    data: str | None = None,
) -> Side:
    """Return fine-tuning of a merged adapter, nothing pruned, no controller."""
    live = _live(model, sizes)
    rows = training_rows(backbone, sizes, data)
    trainer = _trainer(live, rows, backbone, sizes, callbacks, out)
    return Side(trainer, live)


def search_side(
    model: nn.Module,
    backbone: Backbone,
    sizes: Sizes,
    out: Path,
    callbacks: Sequence[TrainerCallback] = (),
    data: str | None = None,
    clock: Clock | None = None,
) -> Side:
    """Return the same fine-tuning with the controller; `clock` is charged by its rounds."""
    live = _live(model, sizes)
    rows = training_rows(backbone, sizes, data)
    pool = common.synthetic_rows(backbone, sizes.pool, sizes.length, seed=1)
    config = sizes.controller
    searcher = SearchCallback(
        live,
        ProbePool(
            EncodedExamples(pool, common.collator(backbone), sizes.probe_batch),
            fresh=config.probe_rows != "micro-dev",
        ),
        SearchSettings(
            config,
            IMPORTANCE[sizes.importance],
            _norms(live, rows, backbone, sizes),
            seed=0,
            total_steps=sizes.steps,
            planned_rounds=planned_rounds(sizes.steps, config),
        ),
        on_round=lambda _state, _record: None,
        clock=clock,
    )
    found = [MaskCallback(live), searcher, *callbacks]
    trainer = _trainer(live, rows, backbone, sizes, found, out)
    return Side(trainer, live, searcher)


def _live(model: nn.Module, sizes: Sizes) -> LiveAdapter:
    merged = common.adapters(model, TARGETS, sizes.rank, seed=0)
    return attach_live_adapter(model, merged, "source")


def _norms(
    live: LiveAdapter, rows: Sequence[EncodedExample], backbone: Backbone, sizes: Sizes
) -> dict[str, Tensor] | None:
    if sizes.importance not in NEEDS_NORMS:
        return None
    batches = EncodedExamples(rows, common.collator(backbone), sizes.probe_batch).batches(
        range(len(rows))
    )
    return input_norms(live.model, live.layers, [batch for _, batch in batches])


def _trainer(
    live: LiveAdapter,
    rows: Sequence[EncodedExample],
    backbone: Backbone,
    sizes: Sizes,
    callbacks: Sequence[TrainerCallback],
    out: Path,
) -> Trainer:
    return build_trainer(
        live.model,
        rows,
        common.collator(backbone),
        callbacks,
        out,
        TrainerSettings(
            seed=0,
            epochs=sizes.epochs,
            max_steps=None,
            batch_size=sizes.batch_size,
            accumulation=1,
            learning_rate=1e-4,
            lr_decay=0.85,
            weight_decay=0.0,
            max_grad_norm=1.0,
            save_every=sizes.steps + 1,  # checkpoints cost both sides the same
            on_cpu=backbone.device.type == "cpu",
        ),
    )


class Baton:
    """Lets threads run in turns, by a plan; a failure of one ends them all.

    Args:
        plan: whose turn it is, one name after the other.
    """

    def __init__(self, plan: Sequence[str]):
        self._plan = list(plan)
        self._at = 0
        self._changed = threading.Condition()
        self._failed = False

    def take(self, name: str) -> None:
        """Wait for a turn of `name`.

        Raises:
            RuntimeError: another thread failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._plan[self._at] == name)
            if self._failed:
                raise RuntimeError("the other side failed")

    def give(self) -> None:
        """End the turn."""
        with self._changed:
            self._at += 1
            self._changed.notify_all()

    def fail(self) -> None:
        """Wake the others up to end."""
        with self._changed:
            self._failed = True
            self._changed.notify_all()


class TurnCallback(TrainerCallback):
    """Times every step and hands the baton on after it; the Trainer's last callback.

    Args:
        name: of the side.
        baton: shared by the sides.
        clock: charged by the side's rounds.
    """

    def __init__(self, name: str, baton: Baton, clock: Clock):
        self._name = name
        self._baton = baton
        self._clock = clock
        self._began = 0.0
        self._spent = dict.fromkeys(PARTS, 0.0)
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        """Wait for the first turn."""
        self._baton.take(self._name)
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the turn and wait for the next one; the last turn ends with the training."""
        common.synchronised()
        step = {"seconds": time.perf_counter() - self._began}
        before, self._spent = self._spent, _spent(self._clock)
        self.steps.append(step | {part: self._spent[part] - before[part] for part in PARTS})
        if state.global_step < state.max_steps:
            self._baton.give()
            self.begin()

    def end(self) -> None:
        """End the last turn."""
        self._baton.give()


def train_in_turns(sides: Sequence[tuple[Side, TurnCallback]], baton: Baton) -> None:
    """Train all sides to their end, one step at a time.

    Raises:
        Exception: what a side failed with.
    """
    faults: list[BaseException] = []

    def run(side: Side, turns: TurnCallback) -> None:
        try:
            turns.begin()
            side.trainer.train()
            turns.end()
        except BaseException as fault:
            faults.append(fault)
            baton.fail()

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in sides]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if faults:
        raise faults[0]


def turn_plan(names: Sequence[str], steps: int) -> list[str]:
    """Return whose turn it is: each name once a step, who goes first changes with every step."""
    plan: list[str] = []
    for step in range(steps):
        plan += names if step % 2 == 0 else reversed(names)
    return plan


def compare(
    backbone: Backbone, sizes: Sizes, data: str | None = None, repeat: int = 3
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return figures of the time, and a row per step and side.

    Args:
        backbone: gets an adapter attached for the search; the plain side trains a twin.
        sizes: what is trained and probed.
        data: file of questions to train on.
        repeat: times the input norms are taken.
    """
    clock = Clock(lambda: common.synchronised(backbone.device))
    baton = Baton(turn_plan(["plain", "search"], sizes.steps))
    plain_turns = TurnCallback("plain", baton, Clock())
    turns = TurnCallback("search", baton, clock)
    other = common.twin(backbone.model)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        plain = plain_side(other, backbone, sizes, place / "plain", [plain_turns], data)
        search = search_side(
            backbone.model, backbone, sizes, place / "search", [turns], data, clock
        )
        rows = training_rows(backbone, sizes, data)
        take = {"norms": lambda: _norms(search.live, rows, backbone, sizes)}
        norms = common.median(common.in_turns(take, repeat)["norms"])
        meters = {"plain": Meter(other), "search": Meter(backbone.model)}
        train_in_turns([(plain, plain_turns), (search, turns)], baton)
    assert search.searcher is not None
    due = {record.step for record in search.searcher.controller.records}
    found = [
        {"side": side, "step": step, "round": side == "search" and step in due} | measured
        for side, steps in (("plain", plain_turns.steps), ("search", turns.steps))
        for step, measured in enumerate(steps, start=1)
    ]
    figures = overhead(found, sizes.steps, norms)
    figures |= {"rounds": len(due), "forwards": {n: m.counts for n, m in meters.items()}}
    figures["published_schedule"] = published(figures, sizes)
    for meter in meters.values():
        meter.remove()
    search.live.model.unload()  # type: ignore[operator]
    return figures, found


def _spent(clock: Clock) -> dict[str, float]:
    """Return the seconds charged to the parts of a round so far."""
    stages = clock.times().values()
    return {part: sum(spent[part].seconds for spent in stages if part in spent) for part in PARTS}


def overhead(rows: Sequence[Mapping[str, Any]], steps: int, norms: float) -> dict[str, Any]:
    """Return the overhead and its split, in seconds and as shares of the plain fine-tuning.

    Args:
        rows: a row per side and step; the first step of each side, which sets up, is left out of
            the medians.
        steps: optimizer steps of a run.
        norms: seconds of the input norms.
    """
    later = [row for row in rows if row["step"] > 1]
    rounds = [row for row in rows if row["round"]]

    def step(side: str) -> float:
        own = [row["seconds"] for row in later if row["side"] == side and not row["round"]]
        return common.median(own)

    def all_rounds(seconds: Sequence[float]) -> float:
        return len(rounds) * common.median(seconds)

    plain, masked = step("plain"), step("search")
    extra = {
        "norms": norms,
        "rounds": all_rounds([row["seconds"] - masked for row in rounds]),
        "steps": steps * (masked - plain),
    }
    split = {"norms": norms}
    split |= {part: all_rounds([row[part] for row in rounds]) for part in PARTS}
    split["rest"] = sum(extra.values()) - sum(split.values())
    totals = {
        side: sum(row["seconds"] for row in later if row["side"] == side)
        for side in ("plain", "search")
    }
    base = steps * plain
    return {
        "search_overhead": sum(extra.values()) / base,
        "search_overhead_totals": (totals["search"] + norms) / totals["plain"] - 1,
        "plain_seconds": base,
        "extra_seconds": extra,
        "split_seconds": split,
        "split": {part: taken / base for part, taken in split.items()},
    }


def published(figures: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
    """Return the overhead of the published schedule at the costs measured here.

    A round follows every tenth of the steps of one row each, and probes the same 16 rows under the
    model as it is and under three masks. Probing a row, and the masks of a round, are taken to
    cost what they cost here.
    """
    config = ControllerConfig(preset="paper")
    rounds = planned_rounds(planned_steps(sizes.rows, sizes.epochs, 1, 1, None), config)
    forwards = rounds * config.rows * (config.baseline + config.candidates)
    split, read = figures["split_seconds"], figures["forwards"]["search"]["probe"]["rows"]
    per_row = (split["baseline"] + split["probe"]) / read if read else 0.0
    per_round = split["masks"] / figures["rounds"]
    seconds = forwards * per_row + rounds * per_round + split["norms"]
    return {
        "computed": True,
        "rounds": rounds,
        "forwards": forwards,
        "seconds": seconds,
        "overhead": seconds / figures["plain_seconds"],
    }


def peak_of(side: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Train one side for a few steps in this process; return its memory in bytes.

    Args:
        side: "plain" or "search".
        options: the benchmark's options.
    """
    chosen = argparse.Namespace(**options)
    common.ready(chosen)
    backbone = common.open_backbone(chosen)
    sizes = memory_sizes(QUICK if chosen.quick else Sizes())
    counted = common.reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        build = {"plain": plain_side, "search": search_side}[side]
        build(backbone.model, backbone, sizes, Path(folder), data=chosen.data).trainer.train()
    cuda = backbone.device.type == "cuda"
    return {
        "training_peak_bytes": common.peak_bytes() if counted else None,
        "cuda_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def memory_sizes(sizes: Sizes) -> Sizes:
    """Return the sizes of a run that is as wide as `sizes`, and short."""
    rows = min(sizes.rows, MEMORY_STEPS * sizes.batch_size)
    epochs = max(1, MEMORY_STEPS * sizes.batch_size // rows)
    controller = replace(sizes.controller, rounds=MEMORY_ROUNDS)
    return replace(sizes, rows=rows, epochs=epochs, controller=controller)


def memory(options: argparse.Namespace, repeat: int) -> list[dict[str, Any]]:
    """Return a row per process: `repeat` of each side, in turns."""
    given = {name: getattr(options, name) for name in _PASSED}
    rows: list[dict[str, Any]] = []
    for turn in range(repeat):
        for side in ("plain", "search") if turn % 2 == 0 else ("search", "plain"):
            done = common.isolated("benchmarks.search:peak_of", {"side": side, "options": given})
            rows.append({"side": side, "process_peak_bytes": done.peak_bytes} | done.value)
    return rows


_PASSED = ("quick", "model", "dtype", "device", "threads", "data")


def memory_figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the ratio of the medians, and which peak it is of."""
    kinds = ("cuda_peak_bytes", "training_peak_bytes", "process_peak_bytes")
    kind = next(k for k in kinds if all(row[k] is not None for row in rows))
    peaks = {
        side: common.median([row[kind] for row in rows if row["side"] == side])
        for side in ("plain", "search")
    }
    return {
        "memory_ratio": peaks["search"] / peaks["plain"],
        "memory_of": kind,
        "memory_bytes": peaks,
    }


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = common.parser(__doc__)
    parser.add_argument("--data", help="file of questions to train on; synthetic if left out")
    parser.add_argument("--epochs", type=int, help="of each side; 10 if left out")
    parser.add_argument("--memory-repeat", type=int, default=3, help="processes of each side")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure time and memory, print them and return the result."""
    options = parsed(argv)
    common.ready(options)
    backbone = common.open_backbone(options)
    sizes = QUICK if options.quick else Sizes()
    if options.epochs is not None:
        sizes = replace(sizes, epochs=options.epochs)
    figures, rows = compare(backbone, sizes, options.data, 1 if options.quick else 3)
    memory_rows = memory(options, 1 if options.quick else options.memory_repeat)
    figures |= memory_figures(memory_rows)
    show(backbone, sizes, figures)
    settings = vars(options) | {"sizes": asdict(sizes)}
    return common.write_result(
        options.json, figures, [*rows, *memory_rows], settings, backbone.device
    )


def show(backbone: Backbone, sizes: Sizes, figures: Mapping[str, Any]) -> None:
    """Print the figures."""
    base = figures["plain_seconds"]
    lines = [["plain fine-tuning", base, 1.0]]
    lines += [[part, s, s / base] for part, s in figures["split_seconds"].items()]
    common.table(
        f"{backbone.public_name}, {backbone.dtype}: {sizes.steps} steps of {sizes.batch_size} rows"
        f" of {sizes.length} tokens, {figures['rounds']} rounds",
        ["part", "seconds", "share of plain"],
        lines,
    )
    common.table(
        "what each side reads",
        ["side", "rows trained", "tokens trained", "rows probed", "tokens probed"],
        [
            [name, *(count for kind in ("train", "probe") for count in found[kind].values())]
            for name, found in figures["forwards"].items()
        ],
    )
    paper, peaks = figures["published_schedule"], figures["memory_bytes"]
    print(
        f"search takes {figures['search_overhead']:+.1%} (from sums"
        f" {figures['search_overhead_totals']:+.1%}); the published schedule, computed:"
        f" {paper['overhead']:+.1%} ({paper['forwards']} forwards)"
    )
    print(
        f"peak memory ({figures['memory_of']}): {common.mib(peaks['search']):.0f} MiB against"
        f" {common.mib(peaks['plain']):.0f} MiB, {figures['memory_ratio']:.3f} times"
    )


if __name__ == "__main__":
    main()
