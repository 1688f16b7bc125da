"""How far entries step after they were pruned and revived, by what a commit does to Adam's moments.

    OMP_NUM_THREADS=1 python -m benchmarks.revival --json revival.json

No model: AdamW gets gradients of a constant part and noise that is three times as large. Half of
the entries are pruned and then revived, after 100, 1000 or 3000 steps of training in all. They were
pruned before the first step, after two steps, or 50 steps ago. A twin has the same gradients and
was never pruned. An entry's figure is the root mean square of its 60 steps after the revival, over
that of its twin: 1 is as far as a neighbour. The tables have the 99th percentile over the entries,
and in parentheses the median; `early` is the worst of the first two ways to be pruned. Gradients
are `even` (one size for all entries) or `uneven` (sizes spread by a factor of e, one standard
deviation of their logarithm).

JSON: `revival_largest`, the worst figure of the rule that the library uses.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common
from grasp_lora.core.pruning.masks import Mask
from grasp_lora.training.live import Block, LiveAdapter

STEPS, QUICK_STEPS = (100, 1000, 3000), (100,)
SPREADS = {"even": 0.0, "uneven": 1.0}
PRUNED = ("before the first step", "after two steps", "50 steps ago")
RANK, WIDTH, AFTER, NOISE = 40, 25, 60, 3.0
LIBRARY = "first cleared, second at least the mean"

Moments = tuple[Tensor, Tensor]
Rule = Callable[[Moments, Tensor, Tensor], None]
"""(first and second moment, keep mask until now, keep mask from now on) -> changed in place."""


def _cleared(*which: int) -> Rule:
    def rule(moments: Moments, kept: Tensor, wanted: Tensor) -> None:
        for one in which:
            moments[one][kept & ~wanted] = 0.0

    return rule


def _second(middle: Callable[[Tensor], Tensor], keep_larger: bool) -> Rule:
    def rule(moments: Moments, kept: Tensor, wanted: Tensor) -> None:
        _cleared(0)(moments, kept, wanted)
        second, revived, staying = moments[1], wanted & ~kept, kept & wanted
        if staying.any():
            least = middle(second[staying])
            own = second[revived]
            second[revived] = own.clamp(min=least) if keep_larger else least.expand_as(own)

    return rule


RULES: dict[str, Rule | None] = {
    "both cleared": _cleared(0, 1),
    "first cleared": _cleared(0),
    "both kept": _cleared(),
    "first cleared, second the mean": _second(torch.mean, keep_larger=False),
    "first cleared, second at least the median": _second(torch.median, keep_larger=True),
    LIBRARY: None,
}
"""Name -> what a commit does to the moments; None is `LiveAdapter.commit` itself."""


def adapter() -> LiveAdapter:
    """Return an adapter of one module without a model, its weights zero."""
    params = {"A": nn.Parameter(torch.zeros(RANK, WIDTH)), "B": nn.Parameter(torch.zeros(1, RANK))}
    block = Block("module", None, "A", "B", slice(None))
    return LiveAdapter(nn.Module(), params, (block,), {})


def commit(
    live: LiveAdapter, optimizer: torch.optim.Optimizer, keep: Tensor, rule: Rule | None
) -> None:
    """Put a keep mask of A in force by one of the rules."""
    kept, param = live.keep("A"), live.params["A"]
    masks = {"A": Mask.of(keep), "B": Mask.of(torch.ones(1, RANK, dtype=torch.bool))}
    live.commit(masks, optimizer if rule is None else None)
    state = optimizer.state.get(param, {})
    if rule is not None and state:
        rule((state["exp_avg"], state["exp_avg_sq"]), kept, keep)


def gradients(spread: float, count: int) -> Tensor:
    """Return noisy gradients of A, [count, RANK, WIDTH]."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, RANK, WIDTH, generator=generator)

    return torch.exp(spread * draw()) * (draw() + NOISE * draw(count))


def steps_of(
    drawn: Tensor, rule: Rule | None, pruned: int | None, revived: int
) -> tuple[Tensor, Tensor]:
    """Return the steps of A after step `revived`, [AFTER, RANK, WIDTH], and the entries revived.

    Args:
        drawn: the gradient of every step.
        rule: what a commit does to the moments.
        pruned: optimizer steps before half of the entries are pruned; None never prunes them.
        revived: optimizer steps before they are revived.
    """
    live, half = adapter(), torch.arange(RANK * WIDTH).view(RANK, WIDTH) % 2 == 0
    param = live.params["A"]
    optimizer = torch.optim.AdamW([param], lr=1e-3, weight_decay=0.0)
    moved: list[Tensor] = []
    for step in range(revived + AFTER):
        if step == pruned:
            commit(live, optimizer, ~half, rule)
        elif step == revived and pruned is not None:
            commit(live, optimizer, torch.ones_like(half), rule)
        before = param.detach().clone()
        param.grad = drawn[step].masked_fill(~live.keep("A"), 0.0)
        optimizer.step()
        live.zero_pruned()
        if step >= revived:
            moved.append(param.detach() - before)
    return torch.stack(moved), half


def figures(spread: float, revived: int) -> list[dict[str, Any]]:
    """Return for each rule and way to be pruned the ratios of steps, at one step of revival."""
    drawn = gradients(spread, revived + AFTER)
    twin, half = steps_of(drawn, None, None, revived)
    usual = twin.pow(2).mean(0).sqrt()[half]
    rows: list[dict[str, Any]] = []
    for name, rule in RULES.items():
        for way, pruned in zip(PRUNED, (0, 2, revived - 50), strict=True):
            moved, _ = steps_of(drawn, rule, pruned, revived)
            ratio = moved.pow(2).mean(0).sqrt()[half] / usual
            largest, middle = ratio.quantile(0.99).item(), ratio.median().item()
            row = {"rule": name, "pruned": way, "step": revived, "largest": largest}
            rows.append(row | {"median": middle})
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure all rules, print and write them."""
    options = common.parser(__doc__).parse_args(arguments)
    common.ready(options)
    steps = QUICK_STEPS if options.quick else STEPS
    rows = [
        row | {"gradients": name}
        for name, spread in SPREADS.items()
        for revived in steps
        for row in figures(spread, revived)
    ]
    ways = {"early": PRUNED[:2], PRUNED[2]: PRUNED[2:]}
    places = [(way, step) for way in ways for step in steps]

    def cell(gradients: str, rule: str, way: str, step: int) -> str:
        found = [
            row
            for row in rows
            if (row["gradients"], row["rule"], row["step"]) == (gradients, rule, step)
            and row["pruned"] in ways[way]
        ]
        return f"{max(r['largest'] for r in found):.1f} ({min(r['median'] for r in found):.1f})"

    worst = max(row["largest"] for row in rows if row["rule"] == LIBRARY)
    result = common.write_result(options.json, {"revival_largest": worst}, rows, options)
    for name in SPREADS:
        common.table(
            f"Steps of revived entries over those of entries never pruned, {name} gradients",
            ["moments", *(f"{way}, step {step}" for way, step in places)],
            [[rule, *(cell(name, rule, *place) for place in places)] for rule in RULES],
        )
    return result


if __name__ == "__main__":
    main()
