"""What ways to a faster step or probe would bring, each against what the library does now.

    OMP_NUM_THREADS=1 python -m benchmarks.levers --json levers.json

Every lever is a prototype here, on the product's own model, adapter and loss. Both sides of a
ratio take turns in one run, and seconds are those of the processor, so that a busy machine hits
both alike. A ratio below 1 is time saved. `--layers` keeps the first layers of the backbone alone:
a layer is like another, and the run is shorter.

- `packing`: the rows of a step (4 rows of 64 to 512 tokens) in one row without padding, as
  `workbench.fit` trains where the library's attention runs: one example after the other. `packed,
  sdpa` masks blocks instead. Beside it what settings offer: the rows in two or four forwards of a
  step (`train.accumulation`).
- `adapter`: the LoRA layers as PEFT computes them, in float32, and as `adapters.products` does, the
  library's way in bfloat16 on a CPU; for adapters on two layers and on all of them: a step, a
  forward pass, and a token of 16 answers. `to float32` says how far the loss and the gradients of
  both are from those of the same step in float32.
- `compile`: the backbone's decoder layers by `torch.compile` (inductor), for a step and for a probe
  of fixed shape, with the library's attention and with sdpa.
- `together`: the rows of all three candidates of a round in one forward of the frozen weights, over
  a forward for each. The adapter's products, which differ by candidate, are left out, so it is the
  most that can be saved.
- `cross entropy`: output layer and loss, forward and backward, on answer tokens alone: in chunks
  whose logits are computed again in the backward pass, and by torch's `linear_cross_entropy` where
  it has one. `share` is the whole of it in a step.

JSON: `levers`, lever -> way -> median seconds over those of the first way;
`differences`, the largest relative difference of loss and gradients to the first way.
"""

import argparse
import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks import common, step
from grasp_lora.models.backbones import Backbone
from grasp_lora.models.example_losses import EncodedExamples, example_losses
from grasp_lora.models.modules import output_embeddings
from grasp_lora.tasks.encoding import Collator, EncodedExample, PackingCollator
from grasp_lora.training.live import LiveAdapter, attach_live_adapter
from grasp_lora.training.trainer import answer_loss

CANDIDATES = 3
Ways = Mapping[str, Callable[[], Any]]


def gradients(live: LiveAdapter) -> Tensor:
    """Return the gradients of the adapter as one vector, and forget them."""
    found = torch.cat(
        [p.grad.flatten().float() for p in live.params.values() if p.grad is not None]
    )
    for param in live.params.values():
        param.grad = None
    return found


def stepped(
    live: LiveAdapter, batches: Sequence[Mapping[str, Any]], items: int
) -> tuple[float, Tensor]:
    """Return the loss of a step over its batches, and the gradients."""
    total = 0.0
    for batch in batches:
        given = dict(batch)
        labels = given.pop("labels")
        loss = answer_loss(live.model(**given, use_cache=False), labels, items)
        loss.backward()
        total += loss.item()
    return total, gradients(live)


def live_on(model: nn.Module, targets: Sequence[str] | str = step.TARGETS) -> LiveAdapter:
    """Return an adapter on a model."""
    return attach_live_adapter(model, common.adapters(model, targets, step.RANK, seed=0), "source")


def of_lengths(backbone: Backbone, lengths: Sequence[int]) -> list[EncodedExample]:
    """Return a row of each length, the longest first, as a step reads them."""
    return [
        common.synthetic_rows(backbone, 1, length, seed=number)[0]
        for number, length in enumerate(sorted(lengths, reverse=True))
    ]


def lengths_of(count: int, low: int, high: int) -> list[int]:
    """Return lengths that are drawn evenly."""
    drawn = torch.randint(low, high + 1, (count,), generator=torch.Generator().manual_seed(3))
    return drawn.tolist()


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference, over that of what was wanted."""
    return float((found - wanted).norm() / wanted.norm())


def compared(
    ways: Ways, repeat: int, told: Callable[[Any], tuple[float, Tensor]] | None = None
) -> dict[str, Any]:
    """Return medians over the first way's, the seconds, and how far results differ from it."""
    found: dict[str, Any] = {}
    if told is not None:
        ends = {name: told(way()) for name, way in ways.items()}
        loss, gradient = next(iter(ends.values()))
        found["differences"] = {
            name: {"loss": abs(one / loss - 1), "gradients": difference(other, gradient)}
            for name, (one, other) in ends.items()
        }
    seconds = common.in_turns(ways, repeat, time.process_time)
    first = common.median(next(iter(seconds.values())))
    ratios = {name: common.median(taken) / first for name, taken in seconds.items()}
    return found | {"ratios": ratios, "seconds": seconds}


def packing(backbone: Backbone, options: argparse.Namespace) -> dict[str, Any]:
    """Steps on rows of different lengths: padded, in several forwards, and packed."""
    low, high = (8, 24) if options.quick else (64, 512)
    steps = [
        lengths_of(4 * options.steps, low, high)[i :: options.steps] for i in range(options.steps)
    ]
    rows = [of_lengths(backbone, lengths) for lengths in steps]
    collate: Collator = common.collator(backbone)
    library, by_mask = live_on(common.twin(backbone.model)), common.twin(backbone.model)
    by_mask.set_attn_implementation("sdpa")
    masked = live_on(by_mask)
    ones = [PackingCollator()(group) for group in rows]
    items = [sum(row.label_tokens for row in group) for group in rows]

    def in_forwards(size: int) -> Callable[[], tuple[float, Tensor]]:
        cut = [[group[i : i + size] for i in range(0, 4, size)] for group in rows]
        made = [[collate(part) for part in parts] for parts in cut]
        return lambda: summed(stepped(library, made[i], items[i]) for i in range(len(rows)))

    ways: Ways = {
        "padded": in_forwards(4),
        "two forwards": in_forwards(2),
        "four forwards": in_forwards(1),
        "packed": lambda: summed(
            stepped(library, [batch], count) for batch, count in zip(ones, items, strict=True)
        ),
        "packed, sdpa": lambda: summed(
            stepped(masked, [batch], count) for batch, count in zip(ones, items, strict=True)
        ),
    }
    whole = sum(len(row.input_ids) for group in rows for row in group)
    held = sum(4 * len(group[0].input_ids) for group in rows)
    return compared(ways, options.repeat, lambda end: end) | {"padding": held / whole}


def summed(ends: Any) -> tuple[float, Tensor]:
    """Return the sums of losses and gradients."""
    losses, grads = zip(*ends, strict=True)
    return sum(losses), torch.stack(grads).sum(0)


def compiling(backbone: Backbone, options: argparse.Namespace) -> dict[str, Any]:
    """Steps and probes of fixed shape, with compiled decoder layers and without."""
    length, count = (16, 2) if options.quick else (256, 4)
    collate = common.collator(backbone)
    rows = common.synthetic_rows(backbone, count, length)
    batch, items = collate(rows), count * common.ANSWER_TOKENS
    batches = EncodedExamples(rows, collate, count).batches(range(count))
    lives, first = {}, {}
    for name in ("library", "sdpa"):
        for made in ("", ", compiled"):
            model = common.twin(backbone.model)
            if name == "sdpa":
                model.set_attn_implementation("sdpa")
            lives[name + made] = live = live_on(model)
            if made:
                for layer in model.model.layers:
                    layer.compile(dynamic=False, backend="eager" if options.quick else "inductor")
            began = time.process_time()
            stepped(live, [batch], items)
            example_losses(live.model.eval(), batches, count)
            first[name + made] = time.process_time() - began
    steps = {name: lambda one=live: stepped(one, [batch], items) for name, live in lives.items()}
    probes = {
        name: lambda one=live: example_losses(one.model, batches, count)
        for name, live in lives.items()
    }
    return {
        "step": compared(steps, options.repeat, lambda end: end),
        "probe": compared(probes, options.repeat),
        "first_seconds": first,
    }


def adapter(backbone: Backbone, options: argparse.Namespace) -> dict[str, Any]:
    """Steps, forward passes and single tokens with the LoRA of PEFT, and with added products."""
    length, count = (16, 2) if options.quick else (256, 4)
    batch = common.collator(backbone)(common.synthetic_rows(backbone, count, length))
    given = {name: value for name, value in batch.items() if name != "labels"}
    token = {"input_ids": torch.zeros(4 * count, 1, dtype=torch.long)}
    items = count * common.ANSWER_TOKENS
    found: dict[str, Any] = {}
    for title, targets in (
        (" and ".join(step.TARGETS), step.TARGETS),
        ("all layers", "all-linear"),
    ):
        peft, ours = (live_on(common.twin(backbone.model), targets) for _ in range(2))
        for layer in peft.layers.values():
            vars(layer).pop("forward", None)

        @torch.no_grad()
        def forward(live: LiveAdapter, inputs: Mapping[str, Any]) -> None:
            live.model(**inputs, use_cache=False)

        ways: dict[str, tuple[Ways, bool]] = {
            "step": (_both(peft, ours, lambda one: stepped(one, [batch], items)), True),
            "forward": (_both(peft, ours, lambda one: forward(one, given)), False),
            "token": (_both(peft, ours, lambda one: forward(one, token)), False),
        }
        for name, (pair, told) in ways.items():
            found[f"{title}, {name}"] = compared(
                pair, options.repeat, (lambda end: end) if told else None
            )
        whole = live_on(copy.deepcopy(backbone.model).float(), targets)  # twins share weights
        loss, exact = stepped(whole, [batch], items)
        ends = {
            "PEFT": stepped(peft, [batch], items),
            "added products": stepped(ours, [batch], items),
        }
        found[f"{title}, step"]["to float32"] = {
            way: {"loss": abs(one / loss - 1), "gradients": difference(other, exact)}
            for way, (one, other) in ends.items()
        }
    return found


def _both(peft: LiveAdapter, ours: LiveAdapter, work: Callable[[LiveAdapter], Any]) -> Ways:
    return {"PEFT": lambda: work(peft), "added products": lambda: work(ours)}


def together(backbone: Backbone, options: argparse.Namespace) -> dict[str, Any]:
    """The rows of all candidates in one forward, over a forward for each."""
    collate, model = common.collator(backbone), backbone.model
    found: dict[str, Any] = {}
    for length in (16,) if options.quick else (32, 256):
        rows = common.synthetic_rows(backbone, CANDIDATES * 12, length, seed=1)
        one = EncodedExamples(rows[:12], collate, 12).batches(range(12))
        all_rows = EncodedExamples(rows, collate, len(rows)).batches(range(len(rows)))

        def each(batches: Any = one) -> None:
            for _ in range(CANDIDATES):
                step.bare_forward(model, batches)

        ways: Ways = {
            "a forward each": each,
            "together": lambda batches=all_rows: step.bare_forward(model, batches),
        }
        found[f"{length} tokens"] = compared(ways, options.repeat)
    return found


def in_chunks(hidden: Tensor, weight: Tensor, labels: Tensor, size: int) -> Tensor:
    """Return the summed cross-entropy; logits of a chunk are computed again for the gradient."""

    def one(part: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(part, weight).float(), wanted, reduction="sum")

    parts = zip(hidden.split(size), labels.split(size), strict=True)
    return torch.stack(
        [checkpoint(one, part, wanted, use_reentrant=False) for part, wanted in parts]
    ).sum()


def losses(backbone: Backbone, options: argparse.Namespace) -> dict[str, Any]:
    """Output layer and loss, forward and backward, over answer tokens alone."""
    output = output_embeddings(backbone.model)
    assert output is not None
    weight = output.get_parameter("weight")
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for count in (8,) if options.quick else (32, 256):
        hidden = torch.randn(count, weight.shape[1], generator=generator).to(weight.dtype)
        labels = torch.randint(0, weight.shape[0], (count,), generator=generator)
        ways = loss_ways(hidden, weight, labels)
        found[f"{count} tokens"] = compared(ways, options.repeat, lambda end: end)
    return found | {"share": loss_share(backbone, options)}


def loss_ways(hidden: Tensor, weight: Tensor, labels: Tensor) -> Ways:
    """Return ways to the loss and the gradient of the hidden states, the library's first."""

    def backward(loss: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
        leaf = hidden.clone().requires_grad_()
        value = loss(leaf)
        value.backward()
        assert leaf.grad is not None
        return value.item(), leaf.grad.float()

    def whole(leaf: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(leaf, weight).float(), labels, reduction="sum")

    ways: dict[str, Callable[[], Any]] = {
        "whole": lambda: backward(whole),
        "chunks of 64": lambda: backward(lambda leaf: in_chunks(leaf, weight, labels, 64)),
    }
    fused: Any = getattr(F, "linear_cross_entropy", None)
    if fused is not None:
        ways["linear_cross_entropy"] = lambda: backward(
            lambda leaf: fused(leaf, weight, labels, reduction="sum")
        )
    return ways


def loss_share(backbone: Backbone, options: argparse.Namespace) -> float:
    """Return the part that output layer and loss take of a step of 4 x 256 tokens, all layers."""
    length, count = (16, 2) if options.quick else (256, 4)
    collate = common.collator(backbone)
    rows = common.synthetic_rows(backbone, count, length)
    live, batch = live_on(common.twin(backbone.model)), collate(rows)
    labels = batch["labels"]
    output = output_embeddings(live.model)
    assert output is not None
    width = output.get_parameter("weight").shape[1]
    kept = len(batch["logits_to_keep"])
    hidden = torch.randn(count, kept, width).to(backbone.dtype)

    class Outputs:
        """Stands for the model's."""

        def __init__(self, logits: Tensor):
            self.logits = logits

    def loss_alone() -> None:
        leaf = hidden.clone().requires_grad_()
        answer_loss(Outputs(output(leaf)), labels).backward()

    items = count * common.ANSWER_TOKENS
    ways: Ways = {"step": lambda: stepped(live, [batch], items), "loss": loss_alone}
    ratio = compared(ways, options.repeat)["ratios"]["loss"]
    return ratio * options.layers / max(options.layers, options.of_layers)


LEVERS: Mapping[str, Callable[[Backbone, argparse.Namespace], dict[str, Any]]] = {
    "packing": packing,
    "adapter": adapter,
    "together": together,
    "cross entropy": losses,
    "compile": compiling,
}


_FIGURES = ("ratios", "differences", "to float32", "seconds")


def ratios_in(found: Mapping[str, Any], above: str = "") -> list[list[Any]]:
    """Return a row for each way: what it is a way of, its name, the ratio, the differences.

    Differences are to the step in float32 where it is measured, else to the first way.
    """
    rows: list[list[Any]] = []
    differences = found.get("to float32", found.get("differences", {}))
    for way, ratio in found.get("ratios", {}).items():
        apart = differences.get(way, {})
        rows.append([above, way, ratio, apart.get("loss"), apart.get("gradients")])
    for name, one in found.items():
        if isinstance(one, Mapping) and name not in _FIGURES:
            rows += ratios_in(one, f"{above}, {name}")
    return rows


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure the levers, print and write them."""
    parser = common.parser(__doc__)
    parser.add_argument("--repeat", type=int, default=5, help="turns of each way")
    parser.add_argument("--steps", type=int, default=3, help="steps of each turn of packing")
    parser.add_argument("--layers", type=int, default=6, help="of the backbone")
    parser.add_argument("--only", nargs="+", choices=list(LEVERS), default=list(LEVERS))
    options = parser.parse_args(arguments)
    if options.quick:
        options.repeat, options.steps = 1, 1
    common.ready(options)
    backbone = common.open_backbone(options)
    layers: Any = backbone.model.model.layers
    options.of_layers = len(layers)
    del layers[options.layers :]
    found: dict[str, Any] = {}
    for name in options.only:
        found[name] = LEVERS[name](backbone, options)
        print(f"{name} is measured", flush=True)
    common.table(
        f"{backbone.public_name}, {backbone.dtype}, {torch.get_num_threads()} threads",
        ["lever", "way", "over the first", "loss differs", "gradients differ"],
        [row for name, one in found.items() for row in ratios_in(one, name)],
    )
    rows = [{"lever": name} | one for name, one in found.items()]
    figures = {"levers": {name: ratios_in(one, name) for name, one in found.items()}}
    return common.write_result(options.json, figures, rows, options, backbone.device)


if __name__ == "__main__":
    main()
