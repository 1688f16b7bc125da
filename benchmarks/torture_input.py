"""Odd and hostile configurations, data files and adapters: each is used, or refused in one error.

    python -m benchmarks.torture_input

prints how many of each kind were tried and survived. Each case is a command given in this process:
a configuration is planned, a data file described, an adapter merged with another. A case survives
if the command ends within `LIMIT` seconds with exit code 0, or with 2 and one error. The cases are
drawn with a seed, so that one that fails can be made again.

Needs the tiny models of `tests/`: run it from the root of a checkout.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors.torch import save_file
from typer.testing import CliRunner

from benchmarks.common import ROOT
from benchmarks.torture_damage import Tally, shown
from grasp_lora.cli import app

LIMIT = 20
COUNTS = {"configurations": 300, "data files": 300, "adapters": 150}

_VALUES = (
    *("", "0", "-1", "010", "1:30", "1e999", ".inf", ".nan", "9" * 5000, "null", "~", "yes", "no"),
    *("[]", "{}", "[[]]", "{a: {b: c}}", "'x'", '"\\ud83d"', '"\\e[31m"', "!!bool abc", "!x y"),
    *("!!python/object/apply:os.system ['true']", "*none", "&a [*a]", "2023-13-45", "<<: 1"),
    *("[" * 300 + "]" * 300, "!!binary aGk=", "!!set {a}", "'\u202egpj'", "\U0001f600", "a" * 5000),
)
_KEYS = (
    *("output", "seed", "preset", "recipe", "budget", "model", "adapters.source", "data.task"),
    *("data.target.language", "data.target.files", "data.target.rows", "data.target.columns"),
    *("data.tests", "data.extra", "data.near_duplicates", "lora.r", "lora.target_modules"),
    *("merge.weights", "merge.kind", "merge.when", "controller.reward", "controller.rounds"),
    *("train.epochs", "train.search", "finetune.mode", "evaluate.metrics", "nonsense", "?", "1.5"),
)
_ODD: tuple[Any, ...] = (
    *(None, True, 0, -1, 1.5, 10**400, "", " ", "x", "a" * 3000, [], {}, [[]], [None], {"text": 1}),
    *({"text": ["a", ""]}, "\ud800", "\x1b[31m", "\u202e", "\x00", ["\udfff"], float("nan")),
    *(float("inf"), -1e308, "(", r"([\w.]|[\w.]?)+!", {"q_proj": "4"}, ["q_proj"], {"(": 1}),
)


class Inputs:
    """A backbone, an adapter of it, and the settings of a small job, in a temporary folder."""

    def __init__(self, folder: Path):
        sys.path.insert(0, str(ROOT / "tests"))
        from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
        from jobs import job

        tiny_backbone_folder(folder / "base")
        self.adapter = tiny_adapter_folder(folder / "adapter", tiny_model(), targets=["q_proj"])
        self._folder, self._job = folder, job

    def settings(self) -> dict[str, Any]:
        """Return the settings of a job that can run."""
        return self._job(self._folder)


@contextmanager
def inputs() -> Iterator[Inputs]:
    """Inputs in a temporary folder; no hub is asked for anything."""
    # The hub's client reads the variable once, when it is imported.
    offline = patch("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with tempfile.TemporaryDirectory() as folder, offline:
        yield Inputs(Path(folder))


def odd_config(draw: random.Random, folder: Path, given: Inputs) -> list[str]:
    """Plan a run by a configuration with odd values, keys and bytes."""
    values, changes = given.settings(), []
    for _ in range(draw.randrange(1, 4)):
        key = draw.choice(_KEYS)
        if draw.random() < 0.5:
            changes += ["--set", f"{key}={draw.choice(_VALUES)}"]
        else:
            _put(values, key, draw.choice(_ODD))
    lines = [json.dumps(values)]
    if draw.random() < 0.4:  # not one mapping of JSON, but lines of YAML
        lines = [f"{name}: {json.dumps(value)}" for name, value in values.items()]
        lines.insert(draw.randrange(len(lines)), f"{draw.choice(_KEYS)}: {draw.choice(_VALUES)}")
        aliases = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
        lines += ["a0: &a0 [x]", *aliases] if draw.random() < 0.2 else []
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    path = folder / "config.yaml"
    path.write_bytes(_damaged(draw, content) if draw.random() < 0.3 else content)
    return ["plan", *changes, str(path)]


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = inner = dict(inner) if isinstance(inner, dict) else {}
        values = inner
    values[last] = value


def odd_data(draw: random.Random, folder: Path, given: Inputs) -> list[str]:
    """Describe rows with odd values in any format, damaged or not."""
    rows: list[dict[str, Any]] = []
    for number in range(draw.randrange(12)):
        row: dict[str, Any] = {"id": f"q{number}", "context": f"House {number}." * 9}
        row |= {"question": "How many?", "answers": [f"{number}"]}
        if draw.random() < 0.3:
            row[draw.choice([*row, "is_impossible", "\ud800"])] = draw.choice(_ODD)
        rows.append({} if draw.random() < 0.05 else row)
    kind = draw.choice(["jsonl", "json", "csv", "tsv", "parquet", "squad"])
    path = folder / f"rows.{'json' if kind == 'squad' else kind}"
    content = _written(draw, kind, rows, folder)
    path.write_bytes(_damaged(draw, content) if draw.random() < 0.5 else content)
    columns = {"context": draw.choice(["context", "question", "none"])}
    values = given.settings()
    target = {"language": draw.choice(["en", "ar", "zh", "sw", "th"]), "files": str(path)}
    target |= {"columns": columns} if draw.random() < 0.2 else {}
    values["data"] |= {"target": target, "max_faulty": draw.choice([0.1, 1.0])}
    config = folder / "config.json"
    config.write_text(json.dumps(values), encoding="utf-8")
    return ["data", "describe", str(config)]


def _written(draw: random.Random, kind: str, rows: list[dict[str, Any]], folder: Path) -> bytes:
    if kind == "parquet":
        plain = {name: [str(row.get(name)) for row in rows] for name in ("id", "context")}
        plain |= {name: [str(row.get(name)) for row in rows] for name in ("question", "answers")}
        safe = {n: [ascii(text) for text in texts] for n, texts in plain.items()}
        parquet.write_table(pa.table(safe), folder / "whole.parquet")
        return (folder / "whole.parquet").read_bytes()
    lines = [json.dumps(row) for row in rows]
    if draw.random() < 0.1:
        lines.append('{"id": ' + "[" * 50_000 + "]" * 50_000 + "}")
    if kind in ("csv", "tsv"):
        mark = "," if kind == "csv" else "\t"
        cells = [[str(value) for value in row.values()] for row in rows]
        text = "\n".join(
            mark.join(row) for row in [["id", "context", "question", "answers"], *cells]
        )
        return text.encode("utf-8", "surrogatepass")
    if kind == "squad":
        text = f'{{"data": [{{"paragraphs": [{{"context": "a", "qas": [{",".join(lines)}]}}]}}]}}'
        return text.encode()
    return ("\n".join(lines) if kind == "jsonl" else f"[{','.join(lines)}]").encode()


def odd_adapter(draw: random.Random, folder: Path, given: Inputs) -> list[str]:
    """Merge an adapter with odd settings, tensors and bytes with a plain one."""
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2}
    config |= {"lora_alpha": 4, "target_modules": ["q_proj"]}
    values = given.settings()
    config["base_model_name_or_path"] = values["model"]["name"]
    for _ in range(draw.randrange(3)):
        odd = ["rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "layers_pattern"]
        config[draw.choice([*config, *odd, "modules_to_save", "unheard_of"])] = draw.choice(_ODD)
    text = json.dumps(config)
    if draw.random() < 0.1:
        text = '{"r":' * 50_000 + "1" + "}" * 50_000
    (folder / "adapter_config.json").write_text(text)
    kinds = [torch.float32, torch.float64, torch.float16, torch.float8_e4m3fn, torch.int64]
    scale = draw.choice([1.0, 1.0, 1e30, 1e300, float("nan"), float("inf")])
    tensors = {
        f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{side}.weight": (
            torch.full((2, 16) if side == "A" else (16, 2), scale, dtype=torch.float64)
        ).to(draw.choice(kinds[: 1 + draw.randrange(5)]))
        for n in range(2)
        for side in "AB"
        if draw.random() < 0.97
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if draw.random() < 0.2:
            content = (folder / name).read_bytes()
            (folder / name).write_bytes(_damaged(draw, content))
    if draw.random() < 0.1:
        content = (folder / "adapter_model.safetensors").read_bytes()
        (folder / "adapter_model.safetensors").write_bytes(content.replace(b"F32", b"F4 "))
    pair = [str(given.adapter), str(folder)]
    draw.shuffle(pair)
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(values), encoding="utf-8")
    adapters = [word for one in pair for word in ("--adapter", one)]
    return ["merge", "--out", str(folder / "merged"), *adapters, str(config_file)]


def _damaged(draw: random.Random, content: bytes) -> bytes:
    """Return bytes that are cut, flipped, doubled or filled with others somewhere."""
    data, place = bytearray(content), draw.randrange(len(content) + 1)
    kind = draw.randrange(4)
    if kind == 0:
        del data[place:]
    elif kind == 1 and place < len(data):
        data[place] ^= 1 << draw.randrange(8)
    elif kind == 2:
        data[place:place] = data[:place]
    else:
        data[place : place + 8] = draw.randbytes(8)
    return bytes(data)


CASES: dict[str, Callable[[random.Random, Path, Inputs], list[str]]] = {
    "configurations": odd_config,
    "data files": odd_data,
    "adapters": odd_adapter,
}


class _TooLong(BaseException):
    """The time of a case is over. No code catches it for an error of its own."""


@contextmanager
def _in_time(seconds: int) -> Iterator[None]:
    def over(_signal: int, _frame: Any) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault_of(given: Inputs, kind: str, number: int, seed: int) -> str:
    """Return why a case did not survive; "" if it did.

    Args:
        given: inputs that are in order, for what the case leaves as it is.
        kind: a key of `CASES`.
        number: number of the case.
        seed: seed of all cases.
    """
    draw = random.Random(f"{kind} {number} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        command = CASES[kind](draw, Path(folder), given)
        try:
            with _in_time(LIMIT):
                done = CliRunner().invoke(app, command)
        except _TooLong:
            return f"took more than {LIMIT} s"
    error = done.exception
    if error is not None and not isinstance(error, SystemExit):
        return f"{type(error).__name__}: {ascii(str(error))[:200]}"
    if done.exit_code not in (0, 2):
        return f"exit code {done.exit_code}: {ascii(done.output)[-200:]}"
    if done.exit_code == 2 and done.output.count("error:") + done.output.count("Error:") != 1:
        return f"not one error: {ascii(done.output)[-200:]}"
    return ""


def torture(
    count: float,
    seed: int,
    kinds: Sequence[str] = tuple(COUNTS),
    say: Callable[[str], None] = print,
) -> Tally:
    """Try cases of every kind; return ("odd input", kind) -> (tried, survived).

    Args:
        count: share of `COUNTS` that is tried of each kind.
        seed: seed of all cases.
        kinds: keys of `CASES`.
        say: gets a line for each case that did not survive.
    """
    found: Tally = {}
    with inputs() as given:
        for kind in kinds:
            tried = max(1, round(count * COUNTS[kind]))
            faults = {number: fault_of(given, kind, number, seed) for number in range(tried)}
            for number, fault in faults.items():
                if fault:
                    say(f"LOST {kind} {number} of seed {seed}: {fault}")
            found["odd input", kind] = tried, sum(not fault for fault in faults.values())
    return found


def main(given: Sequence[str] | None = None) -> int:
    """Print what was tried and what survived; return the exit code."""
    made = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    made.add_argument("--count", type=float, default=1.0, help="share of all cases")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--kind", choices=list(CASES), action="append", help="only this kind")
    options = made.parse_args(given)
    return shown("odd input", torture(options.count, options.seed, options.kind or tuple(CASES)))


if __name__ == "__main__":
    sys.exit(main())
