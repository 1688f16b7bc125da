"""How much faster several processes measure the probes of a round, beside one, on the CPU.

    OMP_NUM_THREADS=1 python -m benchmarks.processes --json processes.json

`--processes` of them with one thread each share the probes of a round and take turns with the first
one measuring all of them alone, while the others wait. So both are measured in one run, on the
same machine; what else it does slows either. A round has the baseline and as many candidates as
the controller's settings say, on rows of one length. `rounds` also computes the masks, which every
process does for itself.

JSON: `probe_efficiency` and `round_efficiency`, the median time of one process over that of all
times their number; 1 is perfect. `probe_efficiencies` has each pair of turns.
"""

import argparse
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from benchmarks import common
from grasp_lora.base.files import read_json, write_json
from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.models import example_losses
from grasp_lora.models.example_losses import EncodedExamples
from grasp_lora.training.live import attach_live_adapter
from grasp_lora.training.search_callback import ProbePool, SearchCallback, SearchSettings

TARGETS = ("q_proj", "v_proj")
PROBE_BATCH = 4
"""Rows per forward pass, so that a candidate takes several."""


def searcher(options: argparse.Namespace) -> SearchCallback:
    """Return a search whose rounds can be run without training."""
    backbone = common.open_backbone(options)
    merged = common.adapters(backbone.model, TARGETS, rank=8, seed=0)
    live = attach_live_adapter(backbone.model, merged, "source")
    config = ControllerConfig(rows=options.rows, baseline=True)
    rows = common.synthetic_rows(backbone, options.rows, options.length)
    return SearchCallback(
        live,
        ProbePool(EncodedExamples(rows, common.collator(backbone), PROBE_BATCH), fresh=False),
        SearchSettings(config, IMPORTANCE["magnitude"], None, 0, 1000, planned_rounds=100),
        on_round=lambda _state, _record: None,
    )


def worker(rank: int, port: int, options: argparse.Namespace, out: Path) -> None:
    """Measure as one of the processes; the first one writes the seconds."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=options.processes)
    search = searcher(options)
    seconds: dict[str, list[float]] = {}
    for turn in range(options.repeat + 1):  # the first turn is not counted
        for way in ("alone", "together") if turn % 2 else ("together", "alone"):
            spent = _round(search, turn, alone=way == "alone")
            for part, value in spent.items() if turn else ():
                seconds.setdefault(f"{way} {part}", []).append(value)
    if rank == 0:
        write_json(out, seconds)
    dist.destroy_process_group()


def _round(search: SearchCallback, number: int, alone: bool) -> dict[str, float]:
    """Return the seconds of a round, and of its probes, from the start of all to the last's end."""
    dist.barrier()
    began, clock = time.perf_counter(), _Times()
    if not alone:
        with clock.around("losses_in_states"):
            search.run_untrained_round(number)
    elif dist.get_rank() == 0:
        with (
            patch.object(example_losses, "rank_and_size", lambda: (0, 1)),
            clock.around("losses_in_states"),
        ):
            search.run_untrained_round(number)
    return {"round": time.perf_counter() - began, "probe": clock.seconds}


class _Times:
    """The seconds of calls of a function of the search."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, name: str) -> Any:
        module = __import__("grasp_lora.training.search_callback", fromlist=[name])
        called: Callable[..., Any] = getattr(module, name)

        def timed(*arguments: Any) -> Any:
            began = time.perf_counter()
            found = called(*arguments)
            self.seconds += time.perf_counter() - began
            return found

        return patch.object(module, name, timed)


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return "alone probe", "together probe", "alone round", "together round" -> seconds."""
    with socket.socket() as found, TemporaryDirectory() as folder:
        found.bind(("127.0.0.1", 0))
        port, out = found.getsockname()[1], Path(folder) / "seconds.json"
        found.close()
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=worker, args=(rank, port, options, out))
            for rank in range(options.processes)
        ]
        for one in workers:
            one.start()
        for one in workers:
            one.join()
        return read_json(out)


def figures_of(seconds: Mapping[str, Sequence[float]], count: int) -> dict[str, Any]:
    """Return the figures of the seconds of `count` processes."""
    figures: dict[str, Any] = {}
    for part in ("probe", "round"):
        alone, shared = seconds[f"alone {part}"], seconds[f"together {part}"]
        figures[f"{part}_efficiency"] = common.median(alone) / common.median(shared) / count
        figures[f"{part}_seconds"] = {
            "alone": common.median(alone),
            "together": common.median(shared),
        }
    pairs = zip(seconds["alone probe"], seconds["together probe"], strict=True)
    figures["probe_efficiencies"] = [one / both / count for one, both in pairs]
    return figures


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = common.parser(__doc__)
    parser.add_argument("--processes", type=int, default=2, help="that share the probes")
    parser.add_argument("--rows", type=int, default=16, help="probing rows of a round")
    parser.add_argument("--length", type=int, default=256, help="tokens of every row")
    parser.add_argument("--repeat", type=int, default=7, help="turns of each")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print and return the result."""
    options = parsed(argv)
    options.device = "cpu"
    if options.quick:
        options.rows, options.length, options.repeat = 8, 32, 2
    seconds = measure(options)
    figures = figures_of(seconds, options.processes)
    common.table(
        f"{options.model}: probes of a round, {options.rows} rows of {options.length} tokens",
        ["what", "1 process, s", f"{options.processes} processes, s", "efficiency"],
        [
            [part, *figures[f"{part}_seconds"].values(), figures[f"{part}_efficiency"]]
            for part in ("probe", "round")
        ],
    )
    rows = [{"what": name, "seconds": values} for name, values in seconds.items()]
    return common.write_result(options.json, figures, rows, options)


if __name__ == "__main__":
    main()
