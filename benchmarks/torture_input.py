"""Odd and hostile configurations, data files and adapters: each is used, or refused in one error.

    python -m benchmarks.torture_input

prints how many of each kind were tried and survived. A case survives if the work is done, or ends
in an error for people (exit code 2 of a command) that can be printed, within `LIMIT` seconds. The
cases are drawn with a seed, so that one that fails can be made again.
"""

import argparse
import json
import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet
from safetensors.torch import save_file

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.adapters.opening import check_openable
from grasp_lora.base.words import printable
from grasp_lora.config.run_config import load_config
from grasp_lora.data.files import load_examples
from grasp_lora.data.leaks import find_leaks
from grasp_lora.tasks.base import TASKS

LIMIT = 20
COUNTS = {"configurations": 300, "data files": 300, "adapters": 150}
FOR_PEOPLE = (ValueError, FileNotFoundError, FloatingPointError)

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


def odd_config(draw: random.Random, folder: Path) -> None:
    """Read a configuration with odd values, keys and bytes."""
    lines = ["model: smollm2", "data:", "  target: {language: es}", "  source: {language: en}"]
    for _ in range(draw.randrange(1, 4)):
        key, value = draw.choice(_KEYS), draw.choice(_VALUES)
        lines.insert(draw.randrange(len(lines) + 1), f"{key.replace('.', ': {', 1)}: {value}")
    aliases = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    if draw.random() < 0.1:
        lines += ["a0: &a0 [x]", *aliases]
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    path = folder / "config.yaml"
    path.write_bytes(_damaged(draw, content) if draw.random() < 0.3 else content)
    key, value = draw.choice(_KEYS), draw.choice(_VALUES)
    load_config(path, [f"{key}={value}"] if draw.random() < 0.5 else [])


def odd_data(draw: random.Random, folder: Path) -> None:
    """Read rows with odd values in any format, damaged or not, and compare their texts."""
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
    task, share = TASKS["qa"], draw.choice([0.1, 1.0])
    given = columns if draw.random() < 0.2 else None
    examples, report = load_examples(path, task, "en", columns=given, max_faulty=share)
    report.line()
    half = len(examples) // 2
    json.dumps([str(leak) for leak in find_leaks({"a": examples[:half], "b": examples[half:]})])


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


def odd_adapter(draw: random.Random, folder: Path) -> None:
    """Read an adapter with odd settings, tensors and bytes."""
    config: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2}
    config |= {"lora_alpha": 4, "target_modules": ["q_proj"], "base_model_name_or_path": "base"}
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
        f"base_model.model.layers.{n}.q_proj.lora_{side}.weight": (
            torch.full((2, 4) if side == "A" else (4, 2), scale, dtype=torch.float64)
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
    draw.choice([read_adapter, check_openable])(folder)


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


CASES: dict[str, Callable[[random.Random, Path], None]] = {
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


def fault_of(kind: str, number: int, seed: int) -> str:
    """Return why a case did not survive; "" if it did.

    Args:
        kind: a key of `CASES`.
        number: number of the case.
        seed: seed of all cases.
    """
    draw = random.Random(f"{kind} {number} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            with _in_time(LIMIT):
                CASES[kind](draw, Path(folder))
        except FOR_PEOPLE as error:
            try:
                printable(str(error)).encode("utf-8")
            except UnicodeError:
                return "its error cannot be printed"
        except _TooLong:
            return f"took more than {LIMIT} s"
        except Exception as error:
            return f"{type(error).__name__}: {ascii(str(error))[:200]}"
    return ""


def main(count: float = 1.0, seed: int = 0) -> int:
    """Try all cases and print a table; return how many did not survive.

    Args:
        count: share of `COUNTS` that is tried of each kind.
        seed: seed of all cases.
    """
    lost = 0
    print("| input | tried | survived |")
    print("|---|---:|---:|")
    for kind, whole in COUNTS.items():
        tried = max(1, round(count * whole))
        faults = {number: fault_of(kind, number, seed) for number in range(tried)}
        bad = {number: fault for number, fault in faults.items() if fault}
        lost += len(bad)
        print(f"| {kind} | {tried} | {tried - len(bad)} |")
        for number, fault in bad.items():
            print(f"<!-- {kind} {number} of seed {seed}: {fault} -->")
    return lost


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=float, default=1.0, help="share of all cases")
    parser.add_argument("--seed", type=int, default=0)
    raise SystemExit(main(**vars(parser.parse_args())) > 0)
