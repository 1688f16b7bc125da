"""What a layer's output loses when entries of its LoRA factors are pruned, by importance.

    OMP_NUM_THREADS=1 python -m benchmarks.importance --json importance.json

No model: the factors of random layers are normal. So are the inputs of 300 tokens, but they share
four directions, and their sizes are spread by a factor of e, one standard deviation of their
logarithm. E is the error of the output (`core.pruning.second_order.output_error`). Every rule cuts
its masks at the ratios 0.2, 0.4, 0.6 and 0.8; where values are fitted, `second_order.compensated`
does it. There are four measurements:

- large layers (rank 8, 64 inputs, 48 outputs): E of each rule over that of `magnitude`;
- small layers (4 to 32 inputs): how often E of `obs` is above that of `magnitude`;
- layers of rank 4 with 16 inputs and 12 outputs: E of `obs` where all entries are removed at once,
  and one after the other, each time by the scores of the values fitted so far;
- layers of rank 16 with as many outputs as inputs: CPU seconds for the factorisation of the second
  moments and for the fit, at ratio 0.4.

JSON: `obs_error`, the mean of E over that of `magnitude` in large layers.
"""

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.core.pruning.masks import keep_entries, pruned_count
from grasp_lora.core.pruning.second_order import Curvature, compensated, output_error, saliency

RATIOS = (0.2, 0.4, 0.6, 0.8)
TOKENS, SHARED = 300, 4
Pair = tuple[Tensor, Tensor]


def layer(rank: int, wide: int, out: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return A [rank, wide], B [out, rank] and inputs [wide, TOKENS] that depend on each other."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs = drawn(wide, TOKENS) + 0.5 * drawn(wide, SHARED) @ drawn(SHARED, TOKENS)
    return drawn(rank, wide), drawn(out, rank), inputs * drawn(wide, 1).exp()


def errors(rank: int, wide: int, out: int, seed: int) -> dict[str, list[float]]:
    """Return way to prune -> E of one layer at each of `RATIOS`."""
    A, B, inputs = layer(rank, wide, out, seed)
    curvature = Curvature.of(inputs @ inputs.T)
    norms = inputs.square().sum(1).sqrt()

    def found(rule: str, measured: Any, fitted: bool) -> Iterator[float]:
        for keep in keep_entries(*IMPORTANCE[rule](A, B, measured), RATIOS):
            new = compensated(A, B, *keep, curvature) if fitted else (A * keep[0], B * keep[1])
            yield output_error((A, B), new, curvature.moments)

    return {
        "magnitude": list(found("magnitude", None, fitted=False)),
        "obs": list(found("obs", curvature, fitted=True)),
        "magnitude, fitted": list(found("magnitude", None, fitted=True)),
        "activation": list(found("activation", norms, fitted=False)),
    }


def in_turn(A: Tensor, B: Tensor, curvature: Curvature) -> list[float]:
    """Return E at each of `RATIOS` where entries go one after the other, each time the least.

    Of both factors the one goes on that has lost the smaller part of its entries.
    """
    keep: Pair = (torch.ones_like(A, dtype=torch.bool), torch.ones_like(B, dtype=torch.bool))
    now: Pair = (A, B)
    gone, found = [0, 0], []
    for ratio in RATIOS:
        wanted = [pruned_count(one.numel(), ratio) for one in keep]
        while gone != wanted:
            left = [gone[at] / wanted[at] if wanted[at] else 1.0 for at in (0, 1)]
            at = left.index(min(left))
            scores = saliency(*now, curvature)[at].masked_fill(~keep[at], float("inf"))
            keep[at].view(-1)[scores.argmin()] = False
            gone[at] += 1
            now = compensated(A, B, *keep, curvature)
        found.append(output_error((A, B), now, curvature.moments))
    return found


def large_layers(count: int) -> list[dict[str, Any]]:
    """Return for each way to prune the mean of E over that of `magnitude`, and the largest."""
    shares: dict[str, list[float]] = {}
    for seed in range(count):
        found = errors(8, 64, 48, seed)
        for way, values in found.items():
            relative = [one / base for one, base in zip(values, found["magnitude"], strict=True)]
            shares.setdefault(way, []).extend(relative)
    return [
        {"pruned by": way, "mean": fmean(values), "largest": max(values)}
        for way, values in shares.items()
    ]


def small_layers(count: int) -> list[dict[str, Any]]:
    """Return for each ratio in how many layers `obs` was above `magnitude`, and of few inputs."""
    above, narrow = Counter[float](), Counter[float]()
    for seed in range(count):
        draw = random.Random(seed)
        wide, out = draw.randint(4, 32), draw.randint(4, 32)
        found = errors(draw.randint(1, 4), wide, out, seed)
        for ratio, one, base in zip(RATIOS, found["obs"], found["magnitude"], strict=True):
            above[ratio] += one > base
            narrow[ratio] += one > base and wide <= 8
    return [
        {"ratio": ratio, "layers": count, "above": above[ratio], "of 4 to 8 inputs": narrow[ratio]}
        for ratio in RATIOS
    ]


def at_once_and_in_turn(count: int) -> list[dict[str, Any]]:
    """Return the means of E over that of `magnitude`, all entries at once and one by one."""
    once: list[float] = []
    turn: list[float] = []
    for seed in range(count):
        A, B, inputs = layer(4, 16, 12, seed)
        found = errors(4, 16, 12, seed)
        slow = in_turn(A, B, Curvature.of(inputs @ inputs.T))
        once += [one / base for one, base in zip(found["obs"], found["magnitude"], strict=True)]
        turn += [one / base for one, base in zip(slow, found["magnitude"], strict=True)]
    return [
        {"entries go": "all at once", "mean": fmean(once)},
        {"entries go": "one after the other", "mean": fmean(turn)},
    ]


def seconds(wide: int) -> dict[str, Any]:
    """Return the CPU seconds that one layer of `wide` inputs and outputs takes."""
    A, B, inputs = layer(16, wide, wide, seed=0)
    moments = inputs @ inputs.T
    began = time.process_time()
    curvature = Curvature.of(moments)
    known = time.process_time()
    (keep,) = keep_entries(*IMPORTANCE["obs"](A, B, curvature), [0.4])
    scored = time.process_time()
    compensated(A, B, *keep, curvature)
    fitted = time.process_time()
    return {"inputs": wide, "factorisation (s)": known - began, "fit (s)": fitted - scored}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print four tables and return the result."""
    options = common.parser(__doc__).parse_args(argv)
    common.ready(options)
    few = options.quick
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "E over that of magnitude, large layers": lambda: large_layers(2 if few else 24),
        "obs above magnitude, small layers": lambda: small_layers(10 if few else 200),
        "E over that of magnitude, obs": lambda: at_once_and_in_turn(1 if few else 12),
        "seconds of obs": lambda: [seconds(wide) for wide in ((64,) if few else (640, 2048))],
    }
    rows: list[dict[str, Any]] = []
    for title, part in parts.items():
        found = part()
        common.table(title, list(found[0]), [list(row.values()) for row in found])
        rows += [{"part": title} | row for row in found]
    error = next(row["mean"] for row in rows if row.get("pruned by") == "obs")
    return common.write_result(options.json, {"obs_error": error}, rows, options)


if __name__ == "__main__":
    main()
