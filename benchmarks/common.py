"""What every benchmark shares: turns, facts about the machine, inputs, tables and results.

A benchmark prints a table and writes a JSON file. Its top level holds the named figures, and
`machine`, `versions`, `command`, `settings` and `rows` (the raw measurements). A ratio comes from
one run in which both sides take turns, and is one of medians: what else the machine does then hits
both sides. Seconds are those of the wall clock.
"""

import argparse
import copy
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from grasp_lora.base.files import cpu_name, peak_memory_bytes, provenance, read_json, write_json
from grasp_lora.core.lora import Adapter, LoraFactors, MergedModule, merge
from grasp_lora.data.builtin import builtin_examples
from grasp_lora.data.files import load_examples
from grasp_lora.models.backbones import Backbone, ModelSpec, forward_accepts, load_backbone
from grasp_lora.models.modules import base_modules, linear_shape, resolve_targets, vocabulary_size
from grasp_lora.tasks.base import task_named
from grasp_lora.tasks.encoding import Collator, EncodedExample, encode_examples

__all__ = [
    "Isolated",
    "adapters",
    "collator",
    "in_turns",
    "isolated",
    "machine",
    "matmul_rate",
    "median",
    "mib",
    "open_backbone",
    "parser",
    "peak_bytes",
    "question_rows",
    "ready",
    "reset_peak",
    "shown",
    "synchronised",
    "synthetic_rows",
    "table",
    "twin",
    "versions",
    "write_result",
]

ROOT = Path(__file__).resolve().parent.parent
ANSWER_TOKENS = 8
"""Tokens of a synthetic row's answer: about what a short answer and its end token take."""

_MATRIX = 2048
_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of all benchmarks; `doc` is the module's docstring."""
    versions()  # the code that is loaded is that of now, whatever is committed meanwhile
    made = argparse.ArgumentParser(description=(doc or "").split("\n", 1)[0])
    made.add_argument("--json", type=Path, metavar="FILE", help="where the figures are written")
    made.add_argument("--quick", action="store_true", help="smallest sizes, a minute at most")
    made.add_argument("--model", default="smollm2", help="short name, folder or hub id")
    made.add_argument("--dtype", default="auto", help="of the frozen weights")
    made.add_argument("--device", default="auto", help="auto, cpu or cuda")
    made.add_argument("--threads", type=int, help="of torch; its own choice if left out")
    return made


def ready(options: argparse.Namespace) -> None:
    """Apply what has to be set before anything is measured."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)


def open_backbone(options: argparse.Namespace) -> Backbone:
    """Load the backbone that the options name."""
    spec = ModelSpec(options.model, dtype=options.dtype, device=options.device)
    return load_backbone(spec, print)


def synchronised(device: torch.device | None = None) -> None:
    """Wait until the device has done all it was given."""
    if torch.cuda.is_available() and (device is None or device.type == "cuda"):
        torch.cuda.synchronize()


def in_turns(
    ways: Mapping[str, Callable[[], object]],
    repeat: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each of `repeat` calls of every way.

    Every way is called once beforehand, not measured; who goes first changes with every turn.

    Args:
        ways: name -> what is measured.
        repeat: calls of each.
        clock: tells seconds. `time.process_time` leaves out what other processes take from this
            one, for work of one thread on a busy machine.
    """
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeat):
        for name in list(ways) if turn % 2 == 0 else reversed(ways):
            synchronised()
            began = clock()
            ways[name]()
            synchronised()
            seconds[name].append(clock() - began)
    return seconds


@torch.no_grad()
def matmul_rate(
    dtype: torch.dtype, device: torch.device, size: int = _MATRIX, repeat: int = 8
) -> float:
    """Return the best rate of `repeat` products of two [size, size] matrices, in FLOP/s.

    The rate is that of `F.linear`, which the layers of a model call: what a forward pass could
    reach at most in this dtype on this device.
    """
    generator = torch.Generator().manual_seed(0)
    inputs, weight = (
        torch.randn(size, size, generator=generator).to(device, dtype) for _ in range(2)
    )
    seconds = in_turns({"product": lambda: F.linear(inputs, weight)}, repeat)["product"]
    return 2 * size**3 / min(seconds)


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """Return what the numbers were measured on; memory in bytes."""
    cuda = device is not None and device.type == "cuda"
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": _memory_bytes(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(device) if cuda else "cpu",
        "platform": platform.platform(),
    }


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def versions() -> dict[str, Any]:
    """Return the versions of Python, the packages and this repository, when first asked."""
    found = provenance()
    changed = _git("status", "--porcelain", "--untracked-files=no")
    return found["packages"] | {
        "python": found["python"],
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(changed) if changed is not None else None,
    }


def shown(value: Any) -> Any:
    """Return an option's value without the folders of this machine."""
    is_place = isinstance(value, str | Path) and Path(value).is_absolute()
    return Path(value).name if is_place else value


def _command() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).name
    return " ".join(["python -m", module, *(str(shown(a)) for a in sys.argv[1:])])


def write_result(
    path: Path | None,
    figures: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    settings: argparse.Namespace | Mapping[str, Any],
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Write a benchmark's result, whole or not at all; return it.

    Args:
        path: the JSON file; None writes nothing.
        figures: name -> the benchmark's figures, put at the top level.
        rows: the raw measurements.
        settings: the options the benchmark ran with.
        device: where it ran.
    """
    given = vars(settings) if isinstance(settings, argparse.Namespace) else settings
    result = dict(figures) | {
        "quick": bool(given.get("quick", False)),
        "machine": machine(device),
        "versions": versions(),
        "command": _command(),
        "settings": {key: shown(value) for key, value in given.items() if key != "json"},
        "rows": list(rows),
    }
    if path is not None:
        write_json(path, result)
    return result


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows under their columns; floats with three digits, numbers to the right."""
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        numeric = any(isinstance(row[number], int | float) for row in rows)
        made.add_column(column, justify="right" if numeric else "left")
    for row in rows:
        made.add_row(*(_cell(value) for value in row))
    Console(highlight=False).print(made)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def mib(count: float) -> float:
    """Return bytes as MiB."""
    return count / (1 << 20)


def peak_bytes() -> int | None:
    """Return the largest resident memory since the process, or `reset_peak`, began.

    Linux hands a process's ru_maxrss on to the programs it starts, so a small child of a large
    parent would report the parent's; the memory map's own high-water mark does not do that.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return peak_memory_bytes()


def reset_peak() -> bool:
    """Start counting `peak_bytes` from now on; return whether the system can do that."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class Isolated:
    """What a function returned in a process of its own.

    Attributes:
        value: its JSON-able result.
        peak_bytes: largest resident memory of that process, None where unknown.
    """

    value: Any
    peak_bytes: int | None


def twin(model: nn.Module) -> Any:
    """Return a copy of a frozen model that shares its weights and may be changed by itself.

    An adapter, an attention kernel or a compiled layer of the copy leaves the model as it was, and
    no second set of weights is held.
    """
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def isolated(function_name: str, args: Mapping[str, Any]) -> Isolated:
    """Call `module:function` with keyword arguments in a fresh process.

    Args:
        function_name: such as "benchmarks.search:plain_run".
        args: JSON-able keyword arguments.

    Raises:
        RuntimeError: the process failed; carries the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.common", function_name, str(out)]
        done = subprocess.run(
            command,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(_import_path())},
            input=json.dumps(dict(args)),
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{function_name} failed in its process:\n{done.stderr[-2000:]}")
        found = read_json(out)
    return Isolated(found["value"], found["peak_bytes"])


def _import_path() -> list[str]:
    return [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]


def _child(function_name: str, out: Path) -> None:
    module, function = function_name.split(":")
    value = getattr(importlib.import_module(module), function)(**json.load(sys.stdin))
    write_json(out, {"value": value, "peak_bytes": peak_bytes()})


def adapters(
    model: nn.Module, targets: Sequence[str] | str, rank: int, seed: int
) -> dict[str, MergedModule]:
    """Return two random adapters for `model`, merged as `cat` with weights 1/2 and 1/2.

    Args:
        model: the bare model.
        targets: as LoRA's `target_modules`, or "all-linear".
        rank: of each of the two; the merge has twice as much.
        seed: of the factors.
    """
    modules = base_modules(model)
    names = resolve_targets(model, targets)
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Adapter:
        drawn: dict[str, LoraFactors] = {}
        for name in names:
            inputs, outputs = linear_shape(modules[name]) or (0, 0)
            a = torch.randn(rank, inputs, generator=generator) / inputs**0.5
            b = torch.randn(outputs, rank, generator=generator) * 0.01
            drawn[name] = LoraFactors(a, b, 1.0)
        return drawn

    return merge("cat", [draw(), draw()], [0.5, 0.5])


def collator(backbone: Backbone) -> Collator:
    """Return the collator that fits the backbone's arguments."""
    return Collator(
        backbone.pad_id,
        with_position_ids=forward_accepts(backbone.model, "position_ids"),
        with_logits_to_keep=forward_accepts(backbone.model, "logits_to_keep"),
    )


def synthetic_rows(
    backbone: Backbone, count: int, length: int, seed: int = 0
) -> list[EncodedExample]:
    """Return rows of exactly `length` random tokens, the last `ANSWER_TOKENS` of them the answer.

    Time does not depend on what the tokens say, but on how many there are.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = vocabulary_size(backbone.model)
    drawn = torch.randint(0, vocabulary, (count, length), generator=generator).tolist()
    return [
        EncodedExample(f"row{seed}-{i}", f"group{seed}-{i}", tuple(ids), length - ANSWER_TOKENS, 0)
        for i, ids in enumerate(drawn)
    ]


def question_rows(
    backbone: Backbone, count: int, length: int, data: str | None = None, language: str = "en"
) -> list[EncodedExample]:
    """Return questions as token ids, at most `length` tokens each.

    Args:
        backbone: whose tokenizer is used.
        count: rows; as many as there are, if there are fewer.
        length: tokens of prompt and answer.
        data: file of questions; None takes the embedded ones.
        language: code of the questions' language.
    """
    task = task_named("qa")
    if data is None:
        examples = builtin_examples(language, count)
    else:
        examples = load_examples(Path(data), task, language)[0][:count]
    return encode_examples(examples, task, backbone.tokenizer, length)[0]


if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]))
