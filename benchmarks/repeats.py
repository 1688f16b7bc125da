"""How equal are two runs: again, resumed, on more threads, on another processor, in another dtype?

    python -m benchmarks.repeats --json repeats.json

A small adapter of the backbone is trained, and test examples are scored with it, by the command
line in processes of their own. Each variant does both again with one thing changed: the scoring of
the first adapter, and a training from the start. The table says whether the trained weights are
equal byte for byte. If not, it gives the largest difference between losses of examples (nats) for
the same adapter and for the one trained anew, that of their means, and how far the trained factors
are apart, as a share of their norm.

Another processor is imitated: torch and its libraries are told to use AVX2 only. That changes
nothing where the processor has no more than that.

JSON: `rows`, a row for each variant.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.files import read_jsonl, write_json

_AVX2 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


@dataclass(frozen=True)
class Variant:
    """What differs from the first run.

    Attributes:
        name: of the table.
        beside: name of the variant that it is compared with; "" is the first run.
        environment: variables of the processes.
        settings: "key=value" for --set.
        killed: whether the training is killed after its first checkpoint, and resumed.
    """

    name: str
    beside: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    killed: bool = False


FIRST = Variant("first", settings=("model.dtype=float32",))
VARIANTS = (
    Variant("again", settings=FIRST.settings),
    Variant("killed and resumed", settings=FIRST.settings, killed=True),
    Variant("2 threads", environment={"OMP_NUM_THREADS": "2"}, settings=FIRST.settings),
    Variant("AVX2 only", environment=_AVX2, settings=FIRST.settings),
    Variant("scored 4 at a time", settings=(*FIRST.settings, "evaluate.batch_size=4")),
    Variant("bfloat16", settings=("model.dtype=bfloat16",)),
    Variant("bfloat16, again", beside="bfloat16", settings=("model.dtype=bfloat16",)),
    Variant(
        "bfloat16, 2 threads",
        beside="bfloat16",
        environment={"OMP_NUM_THREADS": "2"},
        settings=("model.dtype=bfloat16",),
    ),
)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the configuration of the first run."""
    rows = {"train": 8, "dev": 8, "micro_dev": 4, "test": 8}
    if not options.quick:
        rows = {"train": 48, "dev": 16, "micro_dev": 4, "test": 32}
    return {
        "model": {"name": options.model, "device": options.device},
        "data": {
            "max_length": 256,
            "source": {"language": "en"},
            "target": {"language": "es", "rows": rows},
        },
        "train": {"epochs": 2, "batch_size": 4, "save_every": 1},
        "evaluate": {"max_new_tokens": 1, "metrics": ["loss"]},
    }


def _command(variant: Variant, *words: str) -> subprocess.Popen[str]:
    changes = [word for change in variant.settings for word in ("--set", change)]
    return subprocess.Popen(
        [sys.executable, "-m", "grasp_lora", *words, *changes],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(variant.environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _ended(process: subprocess.Popen[str]) -> None:
    said, _ = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"a command ended with {process.returncode}:\n{said[-2000:]}")


def _killed_at_checkpoint(variant: Variant, out: Path, *words: str) -> None:
    process = _command(variant, *words)
    while not list(out.parent.glob(f"{out.name}.work/checkpoint-*/grasp.json")):
        if process.poll() is not None:
            raise RuntimeError("the training ended before its first checkpoint")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def trained(variant: Variant, config: Path, out: Path) -> Path:
    """Train as a variant does; return the adapter's folder."""
    words = ("train", str(config), "--role", "target", "--out", str(out))
    if variant.killed:
        _killed_at_checkpoint(variant, out, *words)
    _ended(_command(variant, *words))
    return out


def losses(variant: Variant, config: Path, adapter: Path, out: Path) -> torch.Tensor:
    """Return the loss of each test example with an adapter, in nats, float64."""
    words = ("evaluate", str(adapter), "--config", str(config), "--out", str(out))
    _ended(_command(variant, *words))
    rows = read_jsonl(next(out.rglob("predictions.jsonl")))
    return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)


def apart(one: Path, other: Path) -> float:
    """Return the distance of two adapters' factors, as a share of the norm of the first."""
    found, total = 0.0, 0.0
    others = read_adapter(other).adapter
    for name, module in read_adapter(one).adapter.items():
        for a, b in ((module.A, others[name].A), (module.B, others[name].B)):
            found += float((a.double() - b.double()).square().sum())
            total += float(a.double().square().sum())
    return (found / total) ** 0.5


def measured(
    variant: Variant, done: Mapping[str, tuple[Path, torch.Tensor]], config: Path, folder: Path
) -> tuple[dict[str, Any], tuple[Path, torch.Tensor]]:
    """Do a variant; return its row, and its adapter with the losses of the examples."""
    first, before = done[variant.beside]
    place = folder / variant.name.replace(" ", "-")
    same = losses(variant, config, first, place / "same")
    adapter = trained(variant, config, place / "adapter")
    anew = losses(variant, config, adapter, place / "anew")
    files = [one / "adapter_model.safetensors" for one in (first, adapter)]
    row = {
        "variant": variant.name,
        "beside": variant.beside or FIRST.name,
        "equal_bytes": files[0].read_bytes() == files[1].read_bytes(),
        "equal_losses": bool((same == before).all()),
        "largest_same_adapter": float((same - before).abs().max()),
        "largest_trained_anew": float((anew - before).abs().max()),
        "mean_trained_anew": float((anew.mean() - before.mean()).abs()),
        "factors_apart": apart(first, adapter),
    }
    return row, (adapter, anew)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure every variant; print the table and return the result."""
    options = common.parser(__doc__).parse_args(given)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = folder / "config.json"
        write_json(config, settings_of(options))
        adapter = trained(FIRST, config, folder / "first" / "adapter")
        done = {"": (adapter, losses(FIRST, config, adapter, folder / "first" / "same"))}
        rows = []
        for variant in VARIANTS:
            row, done[variant.name] = measured(variant, done, config, folder)
            rows.append(row)
            print(row, flush=True)
    columns = (
        "variant",
        "beside",
        "equal bytes",
        "example",
        "example, anew",
        "mean, anew",
        "apart",
    )
    names = list(rows[0])
    names.remove("equal_losses")
    common.table("how equal", columns, [[row[name] for name in names] for row in rows])
    return common.write_result(options.json, {}, rows, options)


if __name__ == "__main__":
    main()
