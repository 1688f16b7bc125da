"""From two given adapters to the final adapter: the whole time of each way to choose the ratio.

    OMP_NUM_THREADS=2 python -m benchmarks.end_to_end --json end_to_end.json

- `restart`: a search run, and a final run at its ratio from the merge again.
- `continue`: one run in all, half of its epochs searching and half at the ratio.
- `grid`: one final run for each of eight ratios. Some are run (`measured_points`), the others are
  taken to last as long as those after the first, which alone reads the input norms;
  `--all-points` runs all.
- `authors`: the published schedule, emulated by `benchmarks.authors_schedule`. Its units are
  measured and multiplied by its counts; the whole is projected, not run.

Every fine-tuning run has the same rows, epochs and batches, reads the dev rows after every epoch
and never stops early. Loading the backbone, encoding and test scores are left out on all sides.
The stages of the measured ways are run in a mixed order, the grid's first and last.

JSON: `speedup_vs_grid_restart`, `speedup_vs_grid_continue`, `speedup_vs_authors_schedule` (of
`restart`) and `speedup_vs_authors_schedule_continue`, all a time over ours; `parts_seconds`, way ->
part of `grasp_lora.base.clock.PARTS` -> seconds of the ways that search, as their clocks tell.
"""

import argparse
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import common
from benchmarks.authors_schedule import AuthorsSchedule, Schedule
from grasp_lora.base.files import read_json
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.lora import MergedModule, lora_scaling
from grasp_lora.plans.single import merge_adapters, prune_adapter, search_ratio
from grasp_lora.tasks.encoding import EncodedExample
from grasp_lora.training.live import LiveAdapter, attach_live_adapter
from grasp_lora.training.trainer import answer_loss
from grasp_lora.workbench.context import Context, open_context
from grasp_lora.workbench.merged_folder import read_start, save_plain
from grasp_lora.workbench.rows import load_run_data

GRID = tuple(round(0.1 * n, 1) for n in range(1, 9))
MEASURED = (0.2, 0.6)
SPLITS = ("train", "dev", "micro_dev")
LEAST_RATIO = 0.1
"""A search that ends at 0 would leave the final run without masks: it is then run at this."""


@dataclass(frozen=True)
class Job:
    """Sizes that all sides share.

    Attributes:
        train, dev, micro_dev: rows.
        epochs: of a fine-tuning run.
        batch_size: rows of an optimizer step of ours.
        length: most tokens of a row.
        words: words of a row's text; enough for it to be cut to `length`.
        controller: settings of the controller that differ from its defaults.
    """

    train: int = 50
    dev: int = 50
    micro_dev: int = 16
    epochs: int = 10
    batch_size: int = 4
    length: int = 256
    words: int = 300
    controller: tuple[tuple[str, Any], ...] = ()


QUICK = Job(4, 2, 2, 2, 2, 96, 20, (("rounds", 1), ("rows", 2), ("candidates", 2)))


def given_rows(job: Job) -> dict[str, list[dict[str, Any]]]:
    """Return questions about long made-up texts, as rows of every split; no two texts are alike."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]

    def words(count: int) -> str:
        return " ".join("".join(draw.choices(syllables, k=3)) for _ in range(count))

    def row(name: str) -> dict[str, Any]:
        answer = words(2)
        text = f"{answer} {words(job.words)}"
        return {"id": name, "context": text, "question": f"{words(2)}?", "answers": [answer]}

    return {split: [row(f"{split}-{i}") for i in range(getattr(job, split))] for split in SPLITS}


def settings(job: Job, options: argparse.Namespace, mode: str) -> RunConfig:
    """Return a run's settings in `mode`: "restart", or "continue" in as many epochs in all."""
    epochs = {"restart": (job.epochs, job.epochs), "continue": (job.epochs // 2,) * 2}[mode]
    return RunConfig.model_validate(
        {
            "model": {"name": options.model, "dtype": options.dtype, "device": options.device},
            "data": {"max_length": job.length, "target": {"language": "en"}},
            "controller": dict(job.controller),
            "train": {
                "batch_size": job.batch_size,
                "search": {"epochs": epochs[0]},
                "finetune": {"epochs": epochs[1], "patience": None},
            },
            "finetune": {"mode": mode},
        }
    )


def contexts(job: Job, options: argparse.Namespace) -> dict[str, Context]:
    """Return way -> context, on one backbone, rows encoded.

    Each way has a context of its own: what one has measured of its start must not serve another.
    """
    config = settings(job, options, "restart")
    data = load_run_data(config, lambda _line: None, given={"target": given_rows(job)})
    opened = open_context(config, quiet=True, data=data)
    modes = {"warm-up": "restart", "restart": "restart", "continue": "continue", "grid": "restart"}
    return {way: _anew(opened, settings(job, options, mode)) for way, mode in modes.items()}


def _anew(context: Context, config: RunConfig) -> Context:
    made = Context(config, context.data, context.backbone, context.task, context.reporter)
    for split in SPLITS:
        made.encoded("target", split)
    return made


def write_sources(context: Context, folder: Path) -> list[Path]:
    """Write two random adapters of the configured shape; return their folders."""
    shape = context.config.lora
    scaling = lora_scaling(shape.r, shape.alpha, use_rslora=False)
    merged = common.adapters(context.backbone.model, shape.target_modules, shape.r, seed=0)
    folders: list[Path] = []
    for source in range(2):
        plain = {name: _source(module, source, scaling) for name, module in merged.items()}
        save_plain(folder / f"source{source}", plain, context.backbone, scaling)
        folders.append(folder / f"source{source}")
    return folders


def _source(module: MergedModule, source: int, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
    part = module.parts[source]
    return part.A, part.B / scaling


@dataclass
class Recorder:
    """Runs stages and keeps their seconds.

    Attributes:
        rows: a row per stage, in the order they were run in; `parts` are by the context's clock.
    """

    rows: list[dict[str, Any]]

    def stage(self, way: str, stage: str, context: Context, work: Callable[[], object]) -> None:
        """Run a stage of a way on its context."""
        before = _parts(context)
        began = time.perf_counter()
        work()
        common.synchronised()
        seconds = time.perf_counter() - began
        parts = {part: spent - before.get(part, 0.0) for part, spent in _parts(context).items()}
        self.rows.append({"way": way, "stage": stage, "seconds": seconds, "parts": parts})
        print(f"{way} {stage}: {seconds:.1f} s")


def _parts(context: Context) -> dict[str, float]:
    """Return part -> seconds up to now, by the clock of a context."""
    found: Counter[str] = Counter()
    for stage in context.clock.times().values():
        found.update({part: spent.seconds for part, spent in stage.items()})
    return dict(found)


def run_stages(
    found: Mapping[str, Context],
    points: Sequence[float],
    folder: Path,
    between: Callable[[Path], None],
) -> list[dict[str, Any]]:
    """Run the stages of `restart`, `continue` and of the grid's `points` in a mixed order.

    Args:
        found: way -> context.
        points: ratios of the grid that are run.
        folder: for the results.
        between: called with the merged folder halfway.
    """
    recorder = Recorder([])
    restart, going_on, plain = found["restart"], found["continue"], found["grid"]
    sources = write_sources(restart, folder)
    merged = folder / "merged"
    recorder.stage(
        "all",
        "merge",
        restart,
        lambda: merge_adapters(restart.config, sources, merged, context=restart),
    )
    _warm_up(found["warm-up"], merged, folder / "warm-up")

    def search(context: Context) -> None:
        mode = context.config.finetune.mode
        out = folder / mode / "search"
        recorder.stage(
            mode,
            "search",
            context,
            lambda: search_ratio(context.config, merged, out, context=context),
        )

    def final(context: Context) -> None:
        mode = context.config.finetune.mode
        out = folder / mode
        ratio = max(read_json(out / "search" / "ratio.json")["ratio"], LEAST_RATIO)
        start = {"restart": merged, "continue": out / "search" / "adapter"}[mode]
        recorder.stage(
            mode,
            "final",
            context,
            lambda: prune_adapter(context.config, start, ratio, out / "final", context=context),
        )

    def grid(ratios: Sequence[float]) -> None:
        for ratio in ratios:
            out = folder / f"grid-{ratio}"
            recorder.stage(
                "grid",
                f"{ratio}",
                plain,
                lambda r=ratio, o=out: prune_adapter(plain.config, merged, r, o, context=plain),
            )

    half = (len(points) + 1) // 2
    grid(points[:half])
    search(restart)
    search(going_on)
    between(merged)
    final(going_on)
    final(restart)
    grid(points[half:])
    return recorder.rows


def _warm_up(context: Context, merged: Path, out: Path) -> None:
    # The first steps of a process are slower; no way should have them alone.
    config = context.config.with_training("finetune", max_steps=1)
    prune_adapter(config, merged, 0.5, out, context=replace(context, config=config))


class OurStep:
    """Our own training step, beside which the units are measured.

    Args:
        context: data and backbone; an adapter is attached.
        merged: folder of the merged adapter.
        rows: of one step.
    """

    def __init__(self, context: Context, merged: Path, rows: Sequence[EncodedExample]):
        start = read_start(merged, context.backbone)
        self._live: LiveAdapter = attach_live_adapter(context.backbone.model, start, "source")
        self._optimizer = torch.optim.AdamW(self._live.params.values(), lr=1e-4)
        device = context.backbone.device
        self._batch = {k: v.to(device) for k, v in context.collator(rows).items()}

    def __call__(self) -> None:
        """Train on the rows of one step."""
        batch = dict(self._batch)
        labels = batch.pop("labels")
        answer_loss(self._live.model(**batch, use_cache=False), labels).backward()
        nn.utils.clip_grad_norm_(self._live.params.values(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._live.zero_pruned()

    def remove(self) -> None:
        """Take the adapter off the backbone."""
        self._live.model.unload()  # type: ignore[operator]


def measure_units(
    context: Context, options: argparse.Namespace, merged: Path, batch_size: int, repeat: int
) -> dict[str, list[float]]:
    """Return the seconds of the published schedule's units, and of a step of ours, in turns."""
    plain = argparse.Namespace(**(vars(options) | {"dtype": "float32"}))
    backbone = common.open_backbone(plain)
    parts = [context.encoded("target", split) for split in ("train", "micro_dev", "dev")]
    theirs = AuthorsSchedule(backbone, read_start(merged, backbone), *parts)
    ours = OurStep(context, merged, parts[0][:batch_size])
    found = common.in_turns(theirs.units() | {"our step": ours}, repeat)
    ours.remove()
    theirs.remove()
    return found


def summary(
    job: Job,
    rows: Sequence[Mapping[str, Any]],
    units: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Return the times of all ways and our speed-ups.

    Args:
        job: sizes.
        rows: stages as they were run.
        units: seconds of the published schedule's units.
    """

    def seconds(way: str) -> list[float]:
        return [row["seconds"] for row in rows if row["way"] == way]

    merging, points = sum(seconds("all")), seconds("grid")
    counts = Schedule(job.train, job.dev, job.epochs).counts()
    priced = {
        name: {
            "count": count,
            "unit_seconds": common.median(units[name]),
            "seconds": count * common.median(units[name]),
        }
        for name, count in counts.items()
    }
    theirs = sum(unit["seconds"] for unit in priced.values())
    alike = points[1:] or points
    per_run = {
        "restart": seconds("restart"),
        "continue": [sum(seconds("continue"))],
        "grid": points + [sum(alike) / len(alike)] * (len(GRID) - len(points)),
    }
    whole = {way: merging + sum(runs) for way, runs in per_run.items()}
    whole["authors"] = merging + theirs
    return {
        "speedup_vs_grid_restart": whole["grid"] / whole["restart"],
        "speedup_vs_grid_continue": whole["grid"] / whole["continue"],
        "speedup_vs_authors_schedule": whole["authors"] / whole["restart"],
        "speedup_vs_authors_schedule_continue": whole["authors"] / whole["continue"],
        "seconds": whole,
        "runs": {way: len(runs) for way, runs in per_run.items()} | {"authors": 2},
        "seconds_per_run": {way: sum(runs) / len(runs) for way, runs in per_run.items()}
        | {"authors": theirs / 2},
        "measured_points": len(points),
        "grid_points": len(GRID),
        "authors_schedule": {"projected": True, "units": priced},
        "our_step_seconds": common.median(units["our step"]),
        "parts_seconds": {way: _spent(rows, way) for way in ("restart", "continue")},
    }


def _spent(rows: Sequence[Mapping[str, Any]], way: str) -> dict[str, float]:
    """Return part -> seconds of all stages of a way."""
    found: Counter[str] = Counter()
    for row in rows:
        if row["way"] == way:
            found.update(row["parts"])
    return dict(found)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = common.parser(__doc__)
    parser.add_argument("--all-points", action="store_true", help="run all points of the grid")
    parser.add_argument("--epochs", type=int, help="of a fine-tuning run; 10 if left out")
    parser.add_argument("--repeat", type=int, default=3, help="times each unit is measured")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run and measure all ways, print them and return the result."""
    options = parsed(argv)
    common.ready(options)
    job = QUICK if options.quick else Job()
    if options.epochs is not None:
        job = replace(job, epochs=options.epochs)
    repeat = 1 if options.quick else options.repeat
    found = contexts(job, options)
    units: dict[str, list[float]] = {}

    def measure(merged: Path) -> None:
        units.update(measure_units(found["restart"], options, merged, job.batch_size, repeat))

    points = GRID if options.all_points else MEASURED[: 1 if options.quick else None]
    with tempfile.TemporaryDirectory() as folder:
        rows = run_stages(found, points, Path(folder), measure)
    figures = summary(job, rows, units)
    backbone = found["restart"].backbone
    show(f"{backbone.public_name}, {backbone.dtype}", figures)
    rows += [{"unit": name, "seconds": seconds} for name, seconds in units.items()]
    job_settings = vars(options) | {"job": asdict(job)}
    return common.write_result(options.json, figures, rows, job_settings, backbone.device)


def show(title: str, figures: Mapping[str, Any]) -> None:
    """Print the figures."""
    measured, all_points = figures["measured_points"], figures["grid_points"]
    how = dict.fromkeys(figures["seconds"], "measured") | {"authors": "projected from units"}
    if measured < all_points:
        how["grid"] = f"{measured} of {all_points} runs measured"
    common.table(
        f"{title}: from two adapters to the final one",
        ["way", "runs", "seconds per run", "seconds", ""],
        [
            [way, figures["runs"][way], figures["seconds_per_run"][way], seconds, how[way]]
            for way, seconds in figures["seconds"].items()
        ],
    )
    common.table(
        "units of the published schedule",
        ["unit", "count", "seconds each", "seconds"],
        [[name, *unit.values()] for name, unit in figures["authors_schedule"]["units"].items()],
    )
    for name in (n for n in figures if n.startswith("speedup")):
        print(f"{name}: {figures[name]:.1f}")


if __name__ == "__main__":
    main()
