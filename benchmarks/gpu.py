"""All figures that need a GPU, in one run of at most 8 minutes.

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --tiny --json tiny.json

Backbones have the shapes of Llama 3 and random weights, made on the device: nothing is fetched. A
case is a shape in a format (bfloat16, or 4 bits by bitsandbytes) and does its parts in a process of
its own, so that what one does to the GPU's memory or to its context harms no other. A part gets its
share of the time that is left and repeats its turns while that lasts. What does not fit, or cannot
be done here, is recorded as skipped with the reason; what fails is recorded with its error.
`--tiny` does the same on the CPU in half a minute; its figures mean nothing.

JSON: `cases`, case -> part -> `state` (done, skipped, failed), `seconds`, `peak_bytes` (CUDA's
largest allocated memory in the part) and the part's figures, all from turns within that part:

- `step`: seconds of steps of 4 x 256 tokens. `ours` with the kernels that repeat exactly, as the
  product runs; `any kernels` without asking for them; `plain` is `Trainer` and PEFT; `liger` the
  same with its kernels.
- `probe`: twelve rows under a mask against the bare backbone; `together`, the bare backbone on
  three times the rows in one forward, over three forwards: what trying all candidates of a round at
  once could save at most.
- `attention`, `compile`: our steps by attention, and with compiled layers; the longer rows are one
  of 2048 tokens.
- `memory`: bytes of a training with and without the search.
- `masks`: a round of masks, ours against the plain way, on a float32 adapter of 100M entries.
- `generation`: tokens a second of one batch, prompts of 256 tokens.
- `repetition`: whether two short searches end with the same bytes.
- `search`: the overhead of a whole search, as `benchmarks.search` measures it.
"""

import argparse
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks import common, masks, search, step
from benchmarks.step import Case
from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.generation.generate import GenerationSettings, generate_texts
from grasp_lora.models.backbones import (
    Backbone,
    copy_output_layer_inputs,
    quantization_config,
)
from grasp_lora.models.devices import repeatable_attention, use_repeatable_kernels
from grasp_lora.models.example_losses import EncodedExamples
from grasp_lora.training.live import LiveAdapter, attach_live_adapter

SECONDS = 480.0
START = 20.0
"""Seconds that a process takes to import, at most."""
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
CANDIDATES = 3


class Skipped(Exception):
    """Why a part cannot be done here, or does not fit."""


@dataclass(frozen=True)
class Format:
    """A backbone in a number format.

    Attributes:
        shape: a key of `benchmarks.step.SHAPES`.
        quantization: "none" or "4bit".
        share: of the time, beside the shares of the others.
    """

    shape: str
    quantization: str = "none"
    share: float = 1.0


CASES: Mapping[str, Format] = {
    "llama-1b": Format("llama-1b", share=1.0),
    "llama-8b": Format("llama-8b", share=1.6),
    "llama-8b 4bit": Format("llama-8b", "4bit", 1.4),
    "llama-1b 4bit": Format("llama-1b", "4bit", 0.7),
}
TINY: Mapping[str, Format] = {
    "llama-tiny": Format("llama-tiny"),
    "llama-tiny 4bit": Format("llama-tiny", "4bit"),
}


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        dtype: of the frozen weights.
        device: where all runs.
        rows: examples of a step.
        length: tokens of each.
        long: tokens of a step's one example where attention matters.
        probed: rows of a probe.
        entries: of the adapter whose masks are cut.
        answers: prompts of a batch that is answered.
        new_tokens: tokens written after each.
        turns: most turns of what is repeated while its time lasts.
        compiler: backend of `torch.compile`.
        sizes: of the whole search.
        short: of the search that is repeated.
    """

    dtype: str = "bfloat16"
    device: str = "auto"
    rows: int = 4
    length: int = 256
    long: int = 2048
    probed: int = 12
    entries: int = 100_000_000
    answers: int = 32
    new_tokens: int = 64
    turns: int = 5
    compiler: str = "inductor"
    sizes: search.Sizes = field(default_factory=search.Sizes)
    short: search.Sizes = field(
        default_factory=lambda: replace(
            search.Sizes(), rows=16, epochs=3, controller=ControllerConfig(rounds=3)
        )
    )


WHOLE = Scale()
SMALL = Scale(
    *("float32", "cpu", 2, 16, 32, 2, 20_000, 2, 3, 1, "eager"),
    sizes=search.QUICK,
    short=search.QUICK,
)


@dataclass
class Bench:
    """What the parts of a case share.

    Attributes:
        backbone: frozen, without an adapter; parts change twins of it.
        case: as `benchmarks.step` has it.
        scale: how large everything is.
        left: returns the seconds that the part may still take.
        step_seconds: of our step, once it was measured.
    """

    backbone: Backbone
    case: Case
    scale: Scale
    left: Callable[[], float]
    step_seconds: float | None = None

    def live(self, model: Any | None = None) -> LiveAdapter:
        """Return an adapter on a twin of the backbone, or on the model given."""
        model = common.twin(self.backbone.model) if model is None else model
        merged = common.adapters(model, step.TARGETS, step.RANK, seed=0)
        return attach_live_adapter(model, merged, "source")

    def rows(self, length: int | None = None, size: int | None = None) -> list[Any]:
        """Return the rows of a turn of steps."""
        count = step.STEPS * (size or self.scale.rows)
        return common.synthetic_rows(self.backbone, count, length or self.scale.length)

    def turns(self, ways: Mapping[str, Callable[[], list[float]]]) -> dict[str, list[float]]:
        """Return the seconds that each way tells, in turns, while the time lasts."""
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(self.scale.turns):
            began = time.perf_counter()
            for name in list(ways) if turn % 2 == 0 else reversed(ways):
                found[name] += ways[name]()
            if self.left() < 1.5 * (time.perf_counter() - began):
                break
        return found


@contextmanager
def kernels(device: torch.device, repeatable: bool) -> Iterator[None]:
    """Ask for kernels that repeat exactly, as a training does, or for any."""
    if device.type == "cuda" and not repeatable:
        torch.use_deterministic_algorithms(False)
        try:
            yield
        finally:
            use_repeatable_kernels(device)
        return
    with repeatable_attention(device, lambda: None, print):
        yield


def our_steps(bench: Bench, live: LiveAdapter, rows: Sequence[Any], size: int) -> list[float]:
    """Return the seconds of our steps with the kernels of the product."""
    with kernels(bench.backbone.device, repeatable=True):
        return step.our_steps(live, rows, common.collator(bench.backbone), size)


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return the seconds of each way, and their medians over that of the first."""
    first = common.median(next(iter(seconds.values())))
    return {
        "seconds_of": {name: common.median(taken) for name, taken in seconds.items()},
        "over_first": {name: common.median(taken) / first for name, taken in seconds.items()},
        "raw": {name: list(taken) for name, taken in seconds.items()},
    }


def each(names: Sequence[str], do: Callable[[str], list[float]]) -> dict[str, Any]:
    """Return `medians` of the ways that can be done, and why the others cannot."""
    found: dict[str, list[float]] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            found[name] = do(name)
        except Exception as error:
            absent[name] = worded(error)
    return (medians(found) if found else {}) | {"not_done": absent}


def steps(bench: Bench) -> dict[str, Any]:
    """Our step, the plain one and liger's."""
    rows, size, scale = bench.rows(), bench.scale.rows, bench.scale
    collate, device = common.collator(bench.backbone), bench.backbone.device
    live = bench.live()
    plain = step.with_plain_adapter(common.twin(bench.backbone.model))
    ways: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: our_steps(bench, live, rows, size)
    }

    def faster() -> list[float]:
        with kernels(device, repeatable=False):
            return step.our_steps(live, rows, collate, size)

    def theirs(model: Any, liger: bool) -> list[float]:
        with kernels(device, repeatable=False):
            return step.plain_steps(model, rows, step.plain_collator(collate), size, liger)

    ways["any kernels"] = faster
    ways["plain"] = lambda: theirs(plain, False)
    why = None
    if importlib.util.find_spec("liger_kernel") is None:
        why = "liger-kernel is not installed"
    elif device.type != "cuda":
        why = "liger's kernels need a GPU"
    else:
        fused = step.with_plain_adapter(common.twin(bench.backbone.model))
        ways["liger"] = lambda: theirs(fused, True)
    found = medians(bench.turns(ways))
    bench.step_seconds = found["seconds_of"]["ours"]
    rate = common.matmul_rate(bench.backbone.dtype, device, 256 if scale is SMALL else 8192)
    answers = common.ANSWER_TOKENS
    flops = step.step_flops(live.model, size, scale.length, answers)
    return found | {
        "tokens": size * scale.length,
        "flops": flops,
        "matmul_flops_per_second": rate,
        "matmul_fraction": flops / bench.step_seconds / rate,
        "not_done": {"liger": why} if why else {},
    }


def probe(bench: Bench) -> dict[str, Any]:
    """A probe over the bare forward, and the rows of all candidates in one forward."""
    scale, collate = bench.scale, common.collator(bench.backbone)
    bare, count = common.twin(bench.backbone.model), bench.scale.probed
    rows = common.synthetic_rows(bench.backbone, CANDIDATES * count, scale.length, seed=1)
    probed = EncodedExamples(rows[:count], collate, count)
    seconds = step.probe_turns(bench.live(), bare, probed, repeat=scale.turns)
    alone = probed.batches(range(count))
    wide = EncodedExamples(rows, collate, len(rows)).batches(range(len(rows)))

    def one_by_one() -> None:
        for _ in range(CANDIDATES):
            step.bare_forward(bare, alone)

    ways = {"together": lambda: step.bare_forward(bare, wide), "one by one": one_by_one}
    both = common.in_turns(ways, scale.turns)
    return {
        "probe_over_forward": common.median(seconds["probe"]) / common.median(seconds["bare"]),
        "together": common.median(both["together"]) / common.median(both["one by one"]),
        "raw": seconds | both,
    }


def attention(bench: Bench) -> dict[str, Any]:
    """Our steps by attention, on the usual rows and on a long one."""

    def measured(length: int, size: int) -> dict[str, Any]:
        def steps_with(name: str) -> list[float]:
            model = common.twin(bench.backbone.model)
            model.set_attn_implementation(name)
            return our_steps(bench, bench.live(model), bench.rows(length, size), size)

        return each(ATTENTIONS, steps_with)

    scale = bench.scale
    return {"usual": measured(scale.length, scale.rows), "long": measured(scale.long, 1)}


def compiled(bench: Bench) -> dict[str, Any]:
    """Our steps, and probes, with compiled decoder layers and without."""
    rows, size = bench.rows(), bench.scale.rows
    model = common.twin(bench.backbone.model)
    eager, fast = bench.live(), bench.live(model)
    for layer in model.model.layers:
        layer.compile(dynamic=False, backend=bench.scale.compiler)
    began = time.perf_counter()
    our_steps(bench, fast, rows, size)
    taken = time.perf_counter() - began
    ways = {
        "eager": lambda: our_steps(bench, eager, rows, size),
        "compiled": lambda: our_steps(bench, fast, rows, size),
    }
    return medians(bench.turns(ways)) | {"first_seconds": taken}


def memory(bench: Bench) -> dict[str, Any]:
    """The largest memory of a short training, with and without the search."""
    sizes = search.memory_sizes(bench.scale.sizes)
    build = {"plain": search.plain_side, "search": search.search_side}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, side in build.items():
            model = common.twin(bench.backbone.model)
            reset_peak(bench.backbone.device)
            side(model, bench.backbone, sizes, Path(folder) / name).trainer.train()
            peaks[name] = peak(bench.backbone.device)
    return {"bytes": peaks, "memory_ratio": peaks["search"] / peaks["plain"]}


def cut(bench: Bench) -> dict[str, Any]:
    """A round of masks against the plain way."""
    live = masks.adapter(bench.scale.entries, bench.backbone.device)
    ways = {"ours": lambda: masks.our_round(live), "plain": lambda: masks.plain_round(live)}
    seconds = common.in_turns(ways, min(3, bench.scale.turns))
    entries = sum(param.numel() for param in live.params.values())
    return medians(seconds) | {"entries": entries}


class Numbers:
    """Stands for a tokenizer: texts are written as numbers."""

    def batch_decode(self, ids: torch.Tensor, **_: Any) -> list[str]:
        """Return each row of ids as one text."""
        return [" ".join(map(str, row)) for row in ids.tolist()]


def generation(bench: Bench) -> dict[str, Any]:
    """Tokens that are written a second; nothing ends a text early."""
    scale = bench.scale
    rows = common.synthetic_rows(bench.backbone, scale.answers, scale.length, seed=2)
    settings = GenerationSettings(
        scale.new_tokens, scale.answers, pad_id=0, stop_ids=(), one_line=False
    )
    model, prompts = bench.live().model, [row.input_ids for row in rows]
    seconds = common.in_turns(
        {"batch": lambda: generate_texts(model, Numbers(), prompts, settings)}, 2
    )["batch"]
    return {"tokens_per_second": scale.answers * scale.new_tokens / min(seconds), "raw": seconds}


def repetition(bench: Bench) -> dict[str, Any]:
    """Whether two short searches end alike."""
    ends = [searched(bench) for _ in range(2)]
    return {"same_bytes": ends[0] == ends[1], "ends": ends}


def searched(bench: Bench) -> dict[str, Any]:
    """Return the hash of the adapter after a short search, and its ratio."""
    model = common.twin(bench.backbone.model)
    with tempfile.TemporaryDirectory() as folder:
        side = search.search_side(model, bench.backbone, bench.scale.short, Path(folder))
        with kernels(bench.backbone.device, repeatable=True):
            side.trainer.train()
    assert side.searcher is not None
    digest = hashlib.sha256()
    for name, param in side.live.params.items():
        digest.update(name.encode() + param.detach().cpu().contiguous().numpy().tobytes())
    return {"sha256": digest.hexdigest(), "ratio": side.searcher.choose().ratio}


def whole_search(bench: Bench) -> dict[str, Any]:
    """The overhead of a whole search over the same training without it."""
    sizes = bench.scale.sizes
    if bench.step_seconds is not None:
        needed = 2.6 * sizes.steps * bench.step_seconds
        if needed > bench.left():
            raise Skipped(f"needs about {needed:.0f} s, {max(0.0, bench.left()):.0f} s are left")
    backbone = replace(bench.backbone, model=common.twin(bench.backbone.model))
    figures, rows = search.compare(backbone, sizes, repeat=1)
    return figures | {"steps": sizes.steps, "raw": rows}


PARTS: Mapping[str, tuple[Callable[[Bench], dict[str, Any]], float]] = {
    "step": (steps, 2.0),
    "probe": (probe, 1.0),
    "memory": (memory, 1.0),
    "generation": (generation, 1.0),
    "repetition": (repetition, 1.0),
    "masks": (cut, 1.0),
    "attention": (attention, 1.5),
    "search": (whole_search, 4.0),
    "compile": (compiled, 3.0),
}
"""Part -> (what does it, its share of its case's time). Later parts get what earlier ones left."""


def opened(shown: Format, scale: Scale) -> tuple[Backbone, Case]:
    """Return the backbone of a case, on the device."""
    case = Case(shown.shape, scale.dtype, scale.rows, scale.length)
    if shown.quantization != "none":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise Skipped("bitsandbytes is not installed")
        backbone = step.backbone_of(case, scale.device)
        return replace(backbone, model=quantized(backbone, shown.quantization)), case
    return step.backbone_of(case, scale.device), case


def quantized(backbone: Backbone, quantization: str) -> Any:
    """Return a model with the backbone's weights in a few bits, as `load_backbone` makes it."""
    model = type(backbone.model).from_pretrained(
        None,
        config=AutoConfig.for_model(**backbone.model.config.to_dict()),
        state_dict=backbone.model.state_dict(),
        dtype=backbone.dtype,
        quantization_config=quantization_config(quantization, backbone.dtype),
        device_map={"": backbone.device},
    )
    model.name_or_path = ""  # else PEFT asks the hub for a model called None
    model.requires_grad_(False).eval()
    copy_output_layer_inputs(model)
    return model


def do_case(
    name: str, seconds: float, tiny: bool, tell: Callable[[Mapping[str, Any]], None]
) -> None:
    """Do the parts of a case; `tell` is given a record of each as soon as it is there."""
    until = time.monotonic() + seconds
    cases, scale = (TINY, SMALL) if tiny else (CASES, WHOLE)
    made: list[Bench] = []

    def build() -> dict[str, Any]:
        backbone, case = opened(cases[name], scale)
        made.append(Bench(backbone, case, scale, lambda: 0.0))
        count = sum(p.numel() for p in backbone.model.parameters())
        return {"parameters": count, "machine": common.machine(backbone.device)}

    tell({"part": "build"} | guarded(build))
    if not made:
        return
    (bench,) = made
    parts = {n: one for n, one in PARTS.items() if n != "masks" or name == next(iter(cases))}
    for number, (part, (do, share)) in enumerate(parts.items()):
        rest = sum(each_share for _, each_share in list(parts.values())[number:])
        limit = time.monotonic() + (until - time.monotonic()) * share / rest
        bench.left = lambda limit=limit: limit - time.monotonic()
        if bench.left() <= 0:
            tell({"part": part, "state": "skipped", "why": "no time was left"})
            continue
        reset_peak(bench.backbone.device)
        found = guarded(lambda do=do: do(bench))
        tell({"part": part} | found | {"peak_bytes": peak(bench.backbone.device)})


def guarded(do: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what a part found, or why it was skipped or failed; with its seconds."""
    began = time.monotonic()
    try:
        found = {"state": "done"} | do()
    except Skipped as reason:
        found = {"state": "skipped", "why": str(reason)}
    except Exception as error:
        found = {"state": "failed", "why": worded(error)}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found | {"seconds": time.monotonic() - began}


def worded(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def reset_peak(device: torch.device) -> None:
    """Start counting `peak` from now on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        common.reset_peak()


def peak(device: torch.device) -> int:
    """Return the largest memory since `reset_peak`: allocated by CUDA, or of the process."""
    cuda = device.type == "cuda"
    return torch.cuda.max_memory_allocated(device) if cuda else common.peak_bytes() or 0


def in_a_process(name: str, seconds: float, tiny: bool) -> list[dict[str, Any]]:
    """Do a case in a process of its own, which is ended when it takes much longer than its share.

    Returns:
        The records of its parts. The part that was at work when the process ended, and those after
        it, are told as failed with the reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "parts.jsonl", Path(folder) / "log.txt"
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--case",
            name,
            "--seconds",
            str(seconds),
        ]
        command += ["--parts-to", str(out), *(["--tiny"] if tiny else [])]
        with log.open("w") as told:
            try:
                done = subprocess.run(
                    command,
                    cwd=common.ROOT,
                    stdout=told,
                    stderr=subprocess.STDOUT,
                    timeout=seconds + START,
                )
                why = "" if done.returncode == 0 else f"the process ended with {done.returncode}"
            except subprocess.TimeoutExpired:
                why = f"ended after {seconds + START:.0f} s"
        records = (
            [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        )
        last = log.read_text().strip()[-500:]
    if why:
        known = {record["part"] for record in records}
        for part in ("build", *PARTS):
            if part not in known:
                records.append({"part": part, "state": "failed", "why": f"{why}; {last}"})
    return records


def all_cases(seconds: float, tiny: bool) -> dict[str, dict[str, Any]]:
    """Do all cases within the time; return case -> part -> its record."""
    until = time.monotonic() + seconds
    cases, found = (TINY if tiny else CASES), {}
    for number, (name, shown) in enumerate(cases.items()):
        rest = list(cases.values())[number:]
        left = until - time.monotonic() - START * len(rest)
        share = left * shown.share / sum(one.share for one in rest)
        print(f"{name}: {share:.0f} s", flush=True)
        if share <= 0:
            found[name] = {"build": {"state": "skipped", "why": "no time was left"}}
            continue
        if tiny:
            records: list[dict[str, Any]] = []
            do_case(name, share, tiny, lambda record: records.append(dict(record)))  # noqa: B023
        else:
            records = in_a_process(name, share, tiny)
        found[name] = {record.pop("part"): record for record in records}
    return found


def show(cases: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a row for each part."""
    rows = [
        [case, part, record["state"], record.get("seconds"), told(record)]
        for case, parts in cases.items()
        for part, record in parts.items()
    ]
    common.table("figures of a GPU", ["case", "part", "state", "s", "what"], rows)


_TOLD = ("over_first", "probe_over_forward", "together", "memory_ratio", "tokens_per_second")
_TOLD_TOO = ("same_bytes", "search_overhead", "matmul_fraction", "why")


def told(record: Mapping[str, Any]) -> str:
    """Return the figures of a part in one line."""
    words: list[str] = []
    for name in (*_TOLD, *_TOLD_TOO):
        value = record.get(name)
        if isinstance(value, Mapping):
            words += [f"{key} {number:.2f}" for key, number in value.items()]
        elif value is not None:
            words.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(words)[:160]


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    parser.add_argument("--tiny", action="store_true", help="all on the CPU, in half a minute")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all; 480 at most")
    parser.add_argument("--case", choices=[*CASES, *TINY], help=argparse.SUPPRESS)
    parser.add_argument("--parts-to", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not 0 < options.seconds <= SECONDS:
        parser.error(f"--seconds must be above 0 and at most {SECONDS:.0f}")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Do all cases, print and write them; or one case, for its parent process."""
    options = parsed(arguments)
    if options.case is not None:
        with options.parts_to.open("a") as out:

            def tell(record: Mapping[str, Any]) -> None:
                print(json.dumps(record), file=out, flush=True)

            do_case(options.case, options.seconds, options.tiny, tell)
        return {}
    if not options.tiny and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; --tiny does all on the CPU")
    began = time.monotonic()
    cases = all_cases(options.seconds, options.tiny)
    show(cases)
    settings = vars(options) | {"scale": asdict(SMALL if options.tiny else WHOLE)}
    figures = {"cases": cases, "seconds": time.monotonic() - began}
    return common.write_result(options.json, figures, [], settings)


if __name__ == "__main__":
    main()
