"""What cutting, trying and committing masks costs, in time and memory, up to a billion entries.

    OMP_NUM_THREADS=2 python -m benchmarks.masks --json masks.json

A round here: masks of three candidates, each applied and undone, one committed at ratio 0.8; by
magnitude, two sources, no model. The plain way selects with `kthvalue` for every candidate, clones
the whole adapter and copies it back. Both take turns; memory is measured in processes of their own
(largest resident memory of the round less what was resident before it, over the adapter's bytes),
for a first round and for one that follows a commit. Adapters beyond half a million entries have the
shapes of rank 64 on all linear layers of a 70B Llama.

JSON: `masks_1b_fraction`, a round's time over that of ten optimizer steps of 4 x 256 tokens on the
70B shape, projected from its FLOPs at the measured bfloat16 rate; `masks_1b_extra_memory`, the
larger of the two rounds' extra memory, in adapters. Both are of the largest size that ran.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.training.live import Block, LiveAdapter, block_importance

SIZES = {"0.5M": 500_000, "10M": 10_000_000, "100M": 100_000_000, "1B": 1_000_000_000}
QUICK = {"20k": 20_000, "0.5M": 500_000}
CANDIDATES = (0.75, 0.8, 0.7)
COMMITTED = 0.8
INTERVAL, TOKENS, WEIGHTS = 10, 4 * 256, 70e9
_LAYER = ((8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192)) + ((8192, 28672),) * 3
_SMALL_LAYER = ((576, 576), (576, 192))

SCORE = block_importance(IMPORTANCE["magnitude"], None)


def shapes(entries: int) -> Iterator[tuple[int, int, int]]:
    """Yield (rank, inputs, outputs) of modules that hold about `entries` together."""
    layer, rank = (_LAYER, 64) if entries >= 5_000_000 else (_SMALL_LAYER, 16)
    made = 0
    while made < entries:
        for inputs, outputs in layer:
            made += rank * (inputs + outputs)
            yield rank, inputs, outputs


def adapter(entries: int, device: torch.device | None = None) -> LiveAdapter:
    """Return an adapter of two sources without a model, on the CPU or `device`."""
    generator = torch.Generator().manual_seed(0)
    params: dict[str, nn.Parameter] = {}
    blocks: list[Block] = []
    for number, (rank, inputs, outputs) in enumerate(shapes(entries)):
        a, b = f"{number}.A", f"{number}.B"
        params[a] = nn.Parameter(torch.randn(rank, inputs, generator=generator).to(device))
        params[b] = nn.Parameter(torch.randn(outputs, rank, generator=generator).to(device))
        half = rank // 2
        blocks += [
            Block(str(number), source, a, b, slice(source * half, (source + 1) * half))
            for source in (0, 1)
        ]
    return LiveAdapter(nn.Module(), params, tuple(blocks), {})


def our_round(live: LiveAdapter) -> None:
    """Cut the candidates, try each, commit one."""
    cut = live.masks(SCORE, CANDIDATES)
    for masks in cut:
        with live.trial(masks):
            pass
    live.commit(cut[CANDIDATES.index(COMMITTED)])


@torch.no_grad()
def plain_round(live: LiveAdapter) -> None:
    """Do the same by `kthvalue` and a clone of the adapter for every candidate."""
    for ratio in (*CANDIDATES, COMMITTED):
        whole = {name: param.clone() for name, param in live.params.items()}
        plain_cut(live, ratio)
        for name, param in live.params.items():  # the committed one too: rounds start alike
            param.copy_(whole[name])
        del whole


@torch.no_grad()
def plain_cut(live: LiveAdapter, ratio: float) -> None:
    """Set the lowest `ratio` of every block's tensors to zero."""
    for block in live.blocks:
        for part in (live.params[block.a][block.rows], live.params[block.b][:, block.rows]):
            scores = part.abs()
            border = torch.kthvalue(scores.reshape(-1), round(ratio * scores.numel())).values
            part.mul_(scores > border)


def parts(live: LiveAdapter) -> dict[str, Callable[[], object]]:
    """Return the parts of our round, to be timed one by one."""
    cut = live.masks(SCORE, CANDIDATES)

    def tried() -> None:
        for masks in cut:
            with live.trial(masks):
                pass

    return {
        "importance": lambda: [_done(SCORE(*block)) for block in live.effective_blocks()],
        "importance and selection": lambda: live.masks(SCORE, CANDIDATES),
        "apply and undo": tried,
        "commit": lambda: live.commit(cut[CANDIDATES.index(COMMITTED)]),
    }


def _done(scores: tuple[Tensor, Tensor]) -> None:
    del scores


def memory(way: str, entries: int) -> dict[str, float]:
    """Return the extra memory of a first and a second round, in adapters; for its own process."""
    live = adapter(entries)
    whole = sum(p.numel() * p.element_size() for p in live.params.values())
    round_of = our_round if way == "ours" else plain_round
    found: dict[str, float] = {}
    start = _resident()
    for name in ("first", "second"):
        common.reset_peak()
        round_of(live)
        found[name] = ((common.peak_bytes() or 0) - start) / whole
    return found


def _resident() -> int:
    common.reset_peak()
    return common.peak_bytes() or 0


def timed(entries: int, repeat: int) -> tuple[int, dict[str, list[float]], dict[str, list[float]]]:
    """Return entries, seconds of our round and of the plain one, and those of our parts."""
    live = adapter(entries)
    ways = {"ours": lambda: our_round(live), "plain": lambda: plain_round(live)}
    run = common.in_turns if repeat > 1 else lambda ways, _: _once(ways)
    seconds, split = run(ways, repeat), run(parts(live), repeat)
    return sum(p.numel() for p in live.params.values()), seconds, split


def measured(name: str, entries: int, repeat: int) -> dict[str, Any]:
    """Return the row of one size."""
    count, seconds, split = timed(entries, repeat)
    extra = {
        way: common.isolated("benchmarks.masks:memory", {"way": way, "entries": entries}).value
        for way in seconds
    }
    return {
        "size": name,
        "entries": count,
        "seconds": seconds,
        "split_seconds": split,
        "extra_memory": extra,
        "speedup": common.median(seconds["plain"]) / common.median(seconds["ours"]),
    }


def _once(ways: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
    started: dict[str, list[float]] = {}
    for name, way in ways.items():
        began = time.perf_counter()
        way()
        started[name] = [time.perf_counter() - began]
    return started


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure all sizes, print and write them."""
    parser = common.parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeat", type=int, default=3, help="turns of the sizes below 1B")
    options = parser.parse_args(arguments)
    common.ready(options)
    sizes = QUICK if options.quick else {name: SIZES[name] for name in options.sizes}
    rate = common.matmul_rate(torch.bfloat16, torch.device("cpu"))
    rows = []
    for name, entries in sizes.items():
        rows.append(measured(name, entries, 1 if entries >= 5e8 else options.repeat))
        print(f"{name}: {common.median(rows[-1]['seconds']['ours']):.2f} s a round", flush=True)
    steps = INTERVAL * 4 * WEIGHTS * TOKENS / rate
    last = rows[-1]
    figures = {
        "masks_1b_fraction": common.median(last["seconds"]["ours"]) / steps,
        "masks_1b_extra_memory": max(last["extra_memory"]["ours"].values()),
        "size": last["size"],
        "projected_interval_seconds": steps,
        "matmul_flops_per_second": rate,
    }
    result = common.write_result(options.json, figures, rows, _settings(options))
    common.table(
        "A round of masks, 3 candidates (extra memory in adapters)",
        [
            "entries",
            "ours s",
            "plain s",
            "times",
            "extra",
            "second",
            "plain extra",
            *last["split_seconds"],
        ],
        [
            [
                row["size"],
                common.median(row["seconds"]["ours"]),
                common.median(row["seconds"]["plain"]),
                row["speedup"],
                row["extra_memory"]["ours"]["first"],
                row["extra_memory"]["ours"]["second"],
                max(row["extra_memory"]["plain"].values()),
                *(common.median(s) for s in row["split_seconds"].values()),
            ]
            for row in rows
        ],
    )
    print(figures)
    assert all(math.isfinite(v) for v in figures.values() if isinstance(v, float))
    return result


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    return vars(options) | {"candidates": CANDIDATES, "committed": COMMITTED}


if __name__ == "__main__":
    main()
