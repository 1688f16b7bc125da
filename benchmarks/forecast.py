"""How near the model of cost comes to what is measured here; and its tables for GPUs.

    OMP_NUM_THREADS=1 python -m benchmarks.forecast --json forecast.json
    python -m benchmarks.forecast --tables

Kernels are measured alone on this processor: products of the backbone's own shapes, attention, a
pass over activations, and what the host takes to start a layer that computes next to nothing. The
model of cost puts them together for a step, a reading of probes, an answer, and a step on two ranks
(processes of this machine that share its rows); none of its numbers is fitted to those. Seconds are
those of the processor, medians of turns: what else the machine does is left out.

`--tables` measures nothing. It prints the tables of docs/scale.md from the published rates.

JSON: `ratios`, what -> predicted seconds over measured ones; `machine_measured`, the kernels.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import common, step
from benchmarks.gpu import Numbers
from benchmarks.levers import live_on, stepped
from grasp_lora.core.forecast.machines import GPUS, SHAPES, Machine, Shape
from grasp_lora.core.forecast.times import (
    Search,
    Setting,
    answer_seconds,
    fits,
    last_rank_that_pays,
    read_seconds,
    search_times,
    step_seconds,
)
from grasp_lora.generation.generate import GenerationSettings, generate_texts
from grasp_lora.models.attention import attention_forward
from grasp_lora.models.backbones import Backbone
from grasp_lora.models.example_losses import EncodedExamples, example_losses
from grasp_lora.plans.forecast import shape_of

ROWS, LENGTH, PROBED, ANSWERED, NEW_TOKENS = 4, 256, 12, 8, 16
RANKS = (1, 2, 4, 8, 16, 32, 64)
LINK = 1e9
"""Bytes a second between two processes of one machine; what an adapter takes is next to nothing."""


def seconds_of(way: Callable[[], object], repeat: int) -> float:
    """Return the median processor seconds of a call."""
    return common.median(common.in_turns({"way": way}, repeat, time.process_time)["way"])


def layers_of(backbone: Backbone, options: argparse.Namespace) -> Shape:
    """Keep the first layers of a backbone alone; return its size."""
    model: Any = backbone.model
    del model.model.layers[options.layers :]
    model.config.num_hidden_layers = len(model.model.layers)
    return shape_of(model.config)


@torch.no_grad()
def kernels_here(backbone: Backbone, shape: Shape, options: argparse.Namespace) -> Machine:
    """Return this processor as its kernels measure, for the shapes of the backbone."""
    tokens, dtype, repeat = options.rows * options.length, backbone.dtype, options.repeat

    def drawn(*size: int) -> Tensor:
        return torch.randn(*size).to(dtype)

    pairs = [
        (drawn(tokens, inputs), drawn(outputs, inputs))
        for inputs, outputs in shape.matrices.values()
    ]
    products = seconds_of(lambda: [F.linear(one, weight) for one, weight in pairs], repeat)
    query = drawn(options.rows, shape.heads, options.length, shape.head)
    keys = [drawn(options.rows, shape.key_heads, options.length, shape.head) for _ in range(2)]
    layer: Any = backbone.model.model.layers[0].self_attn  # type: ignore[union-attr]
    scaling = shape.head**-0.5
    attention = seconds_of(
        lambda: attention_forward(layer, query, *keys, None, scaling=scaling), repeat
    )
    seen = options.rows * options.length**2 / 2
    gate, up = drawn(tokens, shape.inner), drawn(tokens, shape.inner)
    passes = seconds_of(lambda: F.silu(gate) * up, repeat)
    return Machine(
        matrix_rate=2 * shape.layer_weights * tokens / products,
        attention_rate=4 * seen * shape.attention_width / attention,
        bandwidth=5 * gate.numel() * gate.element_size() / passes,
        memory=1e12,
        link=LINK,
        layer_seconds=host_seconds(dtype, options),
        waits=True,
    )


def host_seconds(dtype: torch.dtype, options: argparse.Namespace) -> float:
    """Return what it takes to start the kernels of a layer with an adapter, one token wide."""
    layers = 4
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=16,
    )
    live = live_on(LlamaForCausalLM(config).to(dtype).requires_grad_(False).eval())
    ids = torch.ones(1, 2, dtype=torch.long)
    taken = seconds_of(lambda: live.model(input_ids=ids, use_cache=False), 3 * options.repeat)
    return taken / layers


def measured(backbone: Backbone, options: argparse.Namespace) -> dict[str, float]:
    """Return the processor seconds of a step, a reading and an answer of the product."""
    collate, repeat = common.collator(backbone), options.repeat
    live = live_on(common.twin(backbone.model))
    rows = common.synthetic_rows(backbone, options.rows, options.length)
    batch, items = collate(rows), options.rows * common.ANSWER_TOKENS
    probed = common.synthetic_rows(backbone, options.probed, options.length, seed=1)
    batches = EncodedExamples(probed, collate, options.probed).batches(range(options.probed))
    short = common.synthetic_rows(backbone, options.answered, options.length // 4, seed=2)
    prompts = [row.input_ids for row in short]
    settings = GenerationSettings(
        options.new_tokens, options.answered, pad_id=0, stop_ids=(), one_line=False
    )
    ways: Mapping[str, Callable[[], object]] = {
        "step": lambda: stepped(live, [batch], items),
        "reading": lambda: example_losses(live.model, batches, options.probed),
        "answer": lambda: generate_texts(live.model, Numbers(), prompts, settings),
    }
    turns = common.in_turns(ways, repeat, time.process_time)
    return {name: common.median(seconds) for name, seconds in turns.items()}


def predicted(setting: Setting, options: argparse.Namespace) -> dict[str, float]:
    """Return what the model of cost says on the same."""
    answers = common.ANSWER_TOKENS
    return {
        "step": step_seconds(setting, options.rows, options.length, answers),
        "reading": read_seconds(setting, options.probed, options.length, answers),
        "answer": answer_seconds(
            setting, options.answered, options.length // 4, options.new_tokens
        ),
        "step, 2 ranks": step_seconds(setting, options.rows, options.length, answers, ranks=2),
    }


def on_two_ranks(options: argparse.Namespace) -> float:
    """Return the processor seconds of a step on each of two ranks; the longer of both."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", "2", "-m", "benchmarks.forecast", "--rank-to", folder]
        for name in ("model", "dtype", "layers", "rows", "length", "repeat"):
            command += [f"--{name}", str(getattr(options, name))]
        done = subprocess.run(
            command,
            cwd=common.ROOT,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the two ranks failed:\n{done.stderr[-2000:]}")
        return max(json.loads(one.read_text()) for one in Path(folder).glob("*.json"))


def as_rank(options: argparse.Namespace) -> None:
    """Do steps on a part of the rows, gradients summed over the ranks; write the seconds."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    backbone = common.open_backbone(options)
    layers_of(backbone, options)
    live = live_on(common.twin(backbone.model))
    rows = common.synthetic_rows(backbone, options.rows, options.length)[rank::size]
    batch, items = common.collator(backbone)(rows), options.rows * common.ANSWER_TOKENS
    live.model = DistributedDataParallel(live.model)
    seconds = seconds_of(lambda: stepped(live, [batch], items), options.repeat)
    (options.rank_to / f"{rank}.json").write_text(json.dumps(seconds))
    dist.destroy_process_group()


def minutes(seconds: float) -> str:
    """Return a time for a table."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def scale_table(gpu: str, search: Search) -> Iterator[str]:
    """Yield one search on 1 to 64 GPUs, for every size: seconds, and the ranks that pay."""
    heads = [f"{ranks} GPU{'s' if ranks > 1 else ''}" for ranks in RANKS]
    yield f"| {gpu} | {' | '.join(heads)} | pays up to |"
    yield f"|---|{'---:|' * (len(RANKS) + 1)}"
    for name, shape in SHAPES.items():
        setting = Setting(shape, GPUS[gpu], targets=step.TARGETS, together=4)
        cells = [
            minutes(search_times(setting, search, ranks).whole)
            if fits(setting, search.rows, search.length, ranks)
            else "–"
            for ranks in RANKS
        ]
        best = last_rank_that_pays(setting, search, max(RANKS))
        yield f"| {name} | {' | '.join(cells)} | {best or '–'} |"


def probe_table(gpu: str, search: Search) -> Iterator[str]:
    """Yield when probes should ride along: with one more GPU that only probes, or all together."""
    yield f"| {gpu} | GPUs | probes | ride along | one GPU of them probes | that one is idle |"
    yield "|---|---:|---:|---:|---:|---:|"
    for name, shape in SHAPES.items():
        setting = Setting(shape, GPUS[gpu], targets=step.TARGETS, together=4)
        for ranks in (2, 4, 8):
            if not fits(setting, search.rows, search.length, ranks):
                continue
            together = search_times(setting, search, ranks)
            alone = search_times(setting, search, ranks - 1)
            one_gpu = fits(setting, search.rows, search.length, 1)
            probing = search_times(setting, search, 1).riding
            beside = minutes(max(alone.training, probing)) if one_gpu else "does not fit"
            idle = f"{100 * max(0.0, 1 - probing / alone.training):.0f} %" if one_gpu else "–"
            share = together.riding / together.whole
            yield (
                f"| {name} | {ranks} | {100 * share:.0f} % | {minutes(together.whole)} "
                f"| {beside} | {idle} |"
            )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = common.parser(__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="turns of each way")
    parser.add_argument("--layers", type=int, default=30, help="of the backbone, the first ones")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a step")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a row")
    parser.add_argument("--tables", action="store_true", help="print the tables for GPUs alone")
    parser.add_argument("--rank-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.probed, options.answered, options.new_tokens = PROBED, ANSWERED, NEW_TOKENS
    if options.quick:
        options.repeat, options.layers, options.rows, options.length = 1, 2, 2, 16
        options.probed, options.answered, options.new_tokens = 2, 2, 3
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure kernels and what they make up, print and write the ratios; or print the tables."""
    options = parsed(arguments)
    common.ready(options)
    if options.rank_to is not None:
        as_rank(options)
        return {}
    if options.tables:
        usual, large = Search(), Search(rows=64, length=512)
        for title, search in (("4 rows of 256 tokens", usual), ("64 rows of 512", large)):
            print(f"\n{title} a step\n")
            print("\n".join(scale_table("h100", search)))
        print("\n" + "\n".join(probe_table("h100", usual)))
        return {}
    backbone = common.open_backbone(options)
    shape = layers_of(backbone, options)
    here = kernels_here(backbone, shape, options)
    size = float(backbone.dtype.itemsize)
    setting = Setting(shape, here, 2 * step.RANK, tuple(step.TARGETS), entry=size, activation=size)
    found = measured(backbone, options) | {"step, 2 ranks": on_two_ranks(options)}
    told = predicted(setting, options)
    ratios = {name: told[name] / seconds for name, seconds in found.items()}
    common.table(
        f"{backbone.public_name}, {backbone.dtype}, {options.layers} layers",
        ["what", "predicted s", "measured s", "predicted / measured"],
        [[name, told[name], found[name], ratios[name]] for name in found],
    )
    rows = [{"what": n, "predicted": told[n], "measured": found[n]} for n in found]
    figures = {"ratios": ratios, "machine_measured": asdict(here)}
    print({name: f"{value:.3g}" for name, value in asdict(here).items()})
    return common.write_result(options.json, figures, rows, options, backbone.device)


if __name__ == "__main__":
    main()
