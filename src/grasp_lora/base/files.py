"""The run folder: writes that survive a crash, resume, provenance.

A file is written beside its place, synced and renamed, so that a reader sees the old content or
the new, never half of it. `config.json` is written first and makes a folder a run; `done.json`
comes last and says the run is complete.
JSON has no NaN and no infinity: such numbers are written as null.
"""

import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = (
    "grasp-lora",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "tokenizers",
    "numpy",
)
CONFIG_FILE = "config.json"
DONE_FILE = "done.json"
_FORMAT = "grasp-lora run"
_TEMPORARY = ".part"


# Everything a run writes, folders with all they hold. Nothing else is ever removed.
WRITTEN = (
    "adapters",
    "weights",
    "merged",
    "search",
    "final",
    "final-judged",
    "merged-labelled",
    "baselines",
    "evaluations",
    "data.json",
    "rounds.jsonl",
    "ratio.json",
    "ratio.png",
    "scores.json",
    "report.md",
    "provenance.json",
    "timing.json",
    "profile.json",
    "profile.md",
    "profile.png",
)


def check_run(path: Path) -> bool:
    """Look whether a run can go into a folder; changes nothing.

    Args:
        path: the folder; need not exist. A run may be there already, finished or not.

    Returns:
        Whether the folder holds a finished run.

    Raises:
        ValueError: the path is a file, or the folder holds something that is no run.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"'{path}' is a file, but a run needs a folder; set another output")
    if (path / CONFIG_FILE).exists():
        read_config(path)
        return (path / DONE_FILE).exists()
    if path.exists() and holds_something(path):
        raise ValueError(
            f"'{path}' is not empty and no run of grasp-lora (it has no config.json); "
            "set another output, or empty the folder yourself"
        )
    return False


def open_run(path: Path, config: Mapping[str, Any], again: bool = False) -> None:
    """Make a folder the folder of a run that is under way.

    Args:
        path: the folder; made if absent.
        config: JSON-able configuration.
        again: remove all results of an earlier run in the folder. Files that no run writes stay.

    Raises:
        ValueError: as `check_run`.
    """
    check_run(path)
    # The marker goes last: a folder that a crash leaves behind is still known to be a run.
    written = (*WRITTEN, CONFIG_FILE) if again else ()
    beside = [f"{name}.{end}" for name in written for end in ("work", "old")]
    _remove(path / name for name in (DONE_FILE, *beside, *written))
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / CONFIG_FILE, {"format": _FORMAT, "config": jsonable(config)})


def read_config(path: Path) -> dict[str, Any]:
    """Read the configuration of the run in folder `path`.

    Raises:
        FileNotFoundError: `path` is no run folder.
        ValueError: its config.json was not written by grasp-lora.
    """
    stored = read_json(path / CONFIG_FILE)
    if not isinstance(stored, dict) or stored.get("format") != _FORMAT:
        raise ValueError(
            f"'{path / CONFIG_FILE}' was not written by grasp-lora; set another output for the run"
        )
    return stored["config"]


def finish_run(path: Path) -> None:
    """Mark the run as finished. Call it last: a run that has the marker is complete."""
    write_json(path / DONE_FILE, {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")})


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text so that `path` holds the old or the new content at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_TEMPORARY)
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes files only their owner can read; a result may be read by the group.
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, see `write_text` and `jsonable`."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; run the stage that writes it first")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"'{path}' is not JSON ({error}); write it anew") from None


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file by these lines, see `write_text`."""
    lines = (json.dumps(jsonable(record), ensure_ascii=False) + "\n" for record in records)
    write_text(path, "".join(lines))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read all whole lines; a last line without its line end was torn and is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a whole line is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"'{path}' does not exist; run the stage that writes it first")
    lines = path.read_bytes().split(b"\n")[:-1]
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}:{number} is not JSON ({error}); remove the line, or start the stage anew"
            ) from None
    return records


def jsonable(value: Any) -> Any:
    """`value` in JSON's types: paths as text, tuples as lists, NaN and infinity as None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in value]
    return value


def provenance() -> dict[str, Any]:
    """What the numbers were made with: package versions, Python, system, CPU cores."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "packages": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu_count": os.cpu_count(),
    }


def machines_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the machines that rows of a comparison were made on, each once; None is no name.

    A row's `machines` are those of all runs in its price; one of a single run may have `machine`.
    """
    names: list[str] = []
    for row in rows:
        one = row.get("machine")
        names += row.get("machines") or ([machine_name(one)] if one else [])
    return list(dict.fromkeys(names))


def machine_name(machine: Mapping[str, Any]) -> str:
    """Return the name of what a job ran on (`plans.job.machine`): its GPU, else its processor."""
    return str(machine.get("gpu") or machine.get("cpu"))


def cpu_name() -> str:
    """Return the processor's name, with what it multiplies bfloat16 by, if it says so."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    fast = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return f"{name} ({fast[0]})" if fast else name


def peak_memory_bytes() -> int | None:
    """Largest resident memory of this process so far, in bytes; None where unknown (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def holds_something(path: Path) -> bool:
    """Return whether a folder holds more than the temporary files of a crash."""
    return any(not child.name.endswith(_TEMPORARY) for child in path.iterdir())


def check_disk(path: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold.

    Args:
        path: where will be written; need not exist yet.
        needed: bytes that will be written.

    Raises:
        ValueError: there is less free.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ValueError(
            f"'{path}' needs about {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB are free; "
            "free some space or set another output"
        )


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
