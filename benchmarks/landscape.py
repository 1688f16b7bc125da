"""What probes see of a real pair, before, during and after training: the curves, recorded.

    python -m benchmarks.landscape CONFIG --out docs/results/records/probes/PAIR.parquet --work WORK

CONFIG is a run's configuration with source and target rows. The two adapters are trained once (or
taken from `adapters.source` and `adapters.target`), kept in `--work`, and merged. Recorded is the
loss of every micro-dev and dev row at nine ratios, before, halfway through and after a fine-tuning
of the merge, by how that trains: `plain`, with nothing pruned; `random`, each step under a mask of
a ratio drawn evenly from the range, masks nested; `branches`, a few steps from the merge under each
ratio's own mask. Before training also under a uniform shrink.

Each run is a row of the table `--out`; one that is there is not run again, so the command goes on
where it was stopped. What training makes of the ratios is recorded by `grasp-lora
compare` (see `benchmarks.recorded`); `benchmarks.landscape_report` holds the two side by side.
"""

import argparse
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from benchmarks import common, records
from benchmarks.recorded import SOURCE_EPOCHS
from grasp_lora.base.files import jsonable
from grasp_lora.config.run_config import RunConfig, load_config
from grasp_lora.config.sections import Role, Training
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.models.example_losses import example_losses
from grasp_lora.plans.recipes import with_split_seed
from grasp_lora.plans.single import merge_adapters, train_adapter
from grasp_lora.stages.folder import work_folder
from grasp_lora.training.live import LiveAdapter, block_importance
from grasp_lora.workbench.context import Context, open_context
from grasp_lora.workbench.fit import FitOptions, fit, run_steps
from grasp_lora.workbench.merged_folder import read_start

PROBED = tuple(round(0.1 * n, 1) for n in range(9))
TRAININGS = ("plain", "random", "branches")
SHRINKS = (1.0, 0.9, 0.75, 0.5)
BRANCH_STEPS = 8
SPLITS = ("micro_dev", "dev")


@dataclass(frozen=True)
class Pair:
    """What the runs of a pair of languages share.

    Attributes:
        context: data and backbone.
        folders: of the source and of the target adapter.
        work: folder of adapters and checkpoints.
    """

    context: Context
    folders: tuple[Path, Path]
    work: Path

    @property
    def config(self) -> RunConfig:
        """The configuration of the pair."""
        return self.context.config

    def merged(self, weights: tuple[float, float]) -> Path:
        """Return the folder of the merge with these weights."""
        section = self.config.merge.model_copy(update={"weights": weights})
        config = self.config.model_copy(update={"merge": section})
        out = self.work / f"merged-{weights[0]}-{weights[1]}"
        return merge_adapters(
            config, self.folders, out, context=replace(self.context, config=config)
        )


def open_pair(config: RunConfig, work: Path) -> Pair:
    """Return the pair, its two adapters trained where the configuration names none."""
    context = open_context(config)
    given: dict[Role, Path | None] = {
        "source": config.adapters.source,
        "target": config.adapters.target,
    }
    folders: list[Path] = []
    for role, folder in given.items():
        if folder is not None:
            folders.append(folder)
            continue
        asked = config.with_training("source", epochs=SOURCE_EPOCHS)
        folders.append(
            train_adapter(asked, role, work / role, context=replace(context, config=asked))
        )
    return Pair(context, (folders[0], folders[1]), work)


class Prober(TrainerCallback):
    """Measures every probing row at every ratio before the first step and after the given ones.

    Args:
        live: the adapter.
        context: data and backbone.
        norms: input norms of the importance rule, or None.
        steps: optimizer steps after which it measures; 0 is before the first.
    """

    def __init__(
        self,
        live: LiveAdapter,
        context: Context,
        norms: Mapping[str, Tensor] | None,
        steps: Sequence[int],
    ):
        self._live, self._steps = live, steps
        self._score = block_importance(IMPORTANCE[context.config.importance], norms)
        rows = context.rows("target", SPLITS)
        self._count = len(rows.encoded)
        self._batches = rows.batches(range(self._count))
        self.found: dict[str, list[list[float]]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start."""
        if 0 in self._steps:
            self.found["0"] = self.curve(PROBED)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure after the steps asked for."""
        if state.global_step in self._steps:
            self.found[str(state.global_step)] = self.curve(PROBED)

    def curve(self, ratios: Sequence[float]) -> list[list[float]]:
        """Return [ratios][rows] losses, in nats."""
        curve: list[list[float]] = []
        for masks in self._live.masks(self._score, ratios):
            with self._live.trial(masks):
                losses = example_losses(self._live.model, self._batches, self._count)
            curve.append([round(loss, 4) for loss in losses])
        return curve

    def shrinks(self) -> list[list[float]]:
        """Return [SHRINKS][rows] losses of the adapter as it is, shrunk."""
        curve: list[list[float]] = []
        for factor in SHRINKS:
            with self._live.scaled(factor):
                losses = example_losses(self._live.model, self._batches, self._count)
            curve.append([round(loss, 4) for loss in losses])
        return curve


class RandomRatios(TrainerCallback):
    """Puts every optimizer step under a mask of a ratio drawn evenly from [low, high].

    Masks of one step's importance are nested, and what is pruned keeps its value aside. A pruned
    entry's moments go on decaying; they are not cleared, or none would ever build up.

    Args:
        live: the adapter; nothing is pruned when training ends.
        score: importance, as `LiveAdapter.masks` takes it.
        low, high: range of the ratio.
        generator: source of the ratios.
    """

    def __init__(
        self,
        live: LiveAdapter,
        score: Callable[..., tuple[Tensor, Tensor]],
        low: float,
        high: float,
        generator: torch.Generator,
    ):
        self._live, self._score = live, score
        self._low, self._high = low, high
        self._generator = generator

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the mask of the step."""
        share = float(torch.rand((), generator=self._generator))
        self._cut(self._low + share * (self._high - self._low))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put everything back."""
        self._cut(0.0)

    def _cut(self, ratio: float) -> None:
        (masks,) = self._live.masks(self._score, [ratio])
        self._live.commit(masks)


def probe_run(pair: Pair, training: str, seed: int) -> dict[str, Any]:
    """Fine-tune as `training` says ("plain", "random" or "branches"); return the probes."""
    config = pair.config.model_copy(update={"seed": seed})
    context = replace(pair.context, config=config)
    start = read_start(pair.merged((0.5, 0.5)), context.backbone)
    total = run_steps(context, config.training("search"), "target")
    folder = pair.work / "probes" / f"{training}-s{seed}"
    began = time.perf_counter()
    shrinks: list[list[float]] = []
    if training == "branches":
        found = {str(BRANCH_STEPS): [_branch(context, start, r, folder) for r in PROBED]}
    else:
        with context.live(start, config.mask_unit) as live:
            norms = context.norms(live, config.importance)
            prober = Prober(live, context, norms, (0, total // 2, total))
            extra: list[TrainerCallback] = [prober]
            if training == "random":
                score = block_importance(IMPORTANCE[config.importance], norms)
                generator = torch.Generator().manual_seed(seed)
                controller = config.controller
                extra.append(RandomRatios(live, score, controller.low, controller.high, generator))
            else:
                shrinks = prober.shrinks()
            _fit(context, live, config.training("search"), folder, training, extra)
            found = prober.found
    ids = [(split, e.id) for split in SPLITS for e in context.encoded("target", split)]
    return {
        "training": training,
        "seed": seed,
        "steps": total,
        "rows": ids,
        "ratios": PROBED,
        "losses": found,
        "shrinks": {"factors": SHRINKS, "losses": shrinks} if shrinks else None,
        "seconds": time.perf_counter() - began,
    }


def _branch(context: Context, start: Any, ratio: float, folder: Path) -> list[float]:
    """Return the losses after a few steps under the ratio's mask."""
    config = context.config
    section = config.training("search").model_copy(update={"max_steps": BRANCH_STEPS})
    with context.live(start, config.mask_unit) as live:
        norms = context.norms(live, config.importance)
        (masks,) = live.masks(block_importance(IMPORTANCE[config.importance], norms), [ratio])
        live.commit(masks)
        _fit(context, live, section, folder / str(ratio), f"branch {ratio}", [])
        rows = context.rows("target", SPLITS)
        count = len(rows.encoded)
        live.model.eval()
        losses = example_losses(live.model, rows.batches(range(count)), count)
    return [round(loss, 4) for loss in losses]


def _fit(
    context: Context,
    live: LiveAdapter,
    section: Training,
    out: Path,
    title: str,
    extra: Sequence[TrainerCallback],
) -> None:
    # Probes are not part of a checkpoint: a run that was stopped begins anew.
    shutil.rmtree(work_folder(out), ignore_errors=True)
    options = FitOptions(section, title, extra=tuple(extra), choose_best=False)
    fit(context, live, options, work_folder(out))
    shutil.rmtree(work_folder(out), ignore_errors=True)


def planned(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return (training, seed) in the order they are run: the first seed's come first."""
    return [
        (name, seed)
        for seed in options.seeds
        for name in TRAININGS
        # Branches are run once: nothing but the order of eight steps is drawn in them.
        if seed == options.seeds[0] or name != "branches"
        if not options.only or name in options.only
    ]


def pair_parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options that name a pair; `doc` is the module's docstring."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    parser.add_argument("config", type=Path, help="configuration of a run")
    parser.add_argument("--work", type=Path, required=True, help="folder of adapters; may be large")
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    return parser


def config_of(options: argparse.Namespace) -> RunConfig:
    """Return the settings of the pair; its rows are divided alike for every seed of its runs."""
    return with_split_seed(load_config(options.config, options.changes))


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = pair_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="table of the probes")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1337])
    parser.add_argument("--only", nargs="+", choices=TRAININGS, help="of the ways to train")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is not recorded yet."""
    options = parsed(argv)
    pair = open_pair(config_of(options), options.work)
    for name, seed in planned(options):
        job = f"{name}-s{seed}"
        if job in records.jobs(options.out):
            continue
        found = probe_run(pair, name, seed)
        about = {"machine": common.machine(), "versions": common.versions()}
        records.append(options.out, {job: [jsonable(found | about)]})
        print(f"{job}: {time.strftime('%H:%M:%S')}", flush=True)


if __name__ == "__main__":
    main()
