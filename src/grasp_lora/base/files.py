"""Write and read the files of a run folder so that a crash does no harm; record the provenance.

A file is written beside its final path, synced and renamed, so a reader sees the old or the new
content, never a part of it. What a marker stands for is synced before the marker is written, so
that a power cut leaves no marker without it. `config.json` is written first and marks a folder as a
run folder. `done.json` is written last and marks the run as complete. JSON has no NaN and no
infinity: such numbers are written as null.
"""

import errno
import functools
import json
import math
import os
import platform
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from grasp_lora.base.seal import FILES, OWN, broken, damage_of, sealed, stamp
from grasp_lora.base.words import shown_path

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
RUN_CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
TIMES_FILE = "timing.json"
DONE_FILE = "done.json"
STAGE_FILE = "stage.json"
"""The marker of a finished stage: its key and facts about it."""
RECEIPT_FILE = "receipt.json"
"""A hash of all that a result was made from (`plans/receipt.py`)."""
BASE_FACT = "base_model"
"""The fact in a stage's marker that says where its base model is, as the user named it."""
RESULT = "final"
"""The folder of a run's result, in the run folder: what goes out, and nothing else."""
RESULT_STAGE = "shipped"
"""The stage that makes the result, whose folder also has what resuming and later stages read."""
SMALL = "small"
"""The folder of the same result in fewer bytes, where a budget of bytes is given."""
ENCODER_DECODER_TASK = "SEQ_2_SEQ_LM"
"""`task_type` in `adapter_config.json` of an adapter of an encoder-decoder."""

PROMPT_FILE = "prompt.json"
"""In a result that is no adapter: the text that goes ahead of a question."""
FOLDER_LOCK = ".grasp-lora.lock"
"""Lock file in a folder that a process works in (`base.owner`)."""
_FORMAT = "grasp-lora run"
_TEMPORARY = ".part"
_NO_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
"""Errors of a file system that syncs no folders."""


# All files and folders that a run writes. Nothing else is ever removed.
WRITTEN = (
    "adapters",
    "weights",
    "merged",
    "search",
    RESULT,
    RESULT_STAGE,
    f"{RESULT_STAGE}-judged",
    SMALL,
    "merged-labelled",
    "baselines",
    "evaluations",
    "starts",
    "trials",
    "retrained",
    "ratio-probe",
    "rank-probe",
    "recipe.json",
    "recipe.png",
    DATA_FILE,
    "rounds.jsonl",
    "ratio.json",
    "ratio.png",
    "scores.json",
    "report.md",
    "report.html",
    "provenance.json",
    TIMES_FILE,
    RECEIPT_FILE,
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
        raise ValueError(
            f"{shown_path(path)} is a file, but a run needs a folder; set another output"
        )
    if _has_sealed_mark(path):
        return (path / DONE_FILE).exists()
    if (path / RUN_CONFIG_FILE).exists():
        read_config(path)
        return (path / DONE_FILE).exists()
    if path.exists() and holds_something(path):
        raise ValueError(
            f"{shown_path(path)} is not empty and no run of grasp-lora (it has no config.json); "
            "set another output, or empty the folder yourself"
        )
    return False


def open_run(
    path: Path,
    config: Mapping[str, Any],
    again: bool = False,
    threads: int | None = None,
    processes: int | None = None,
) -> None:
    """Make a folder the folder of a run that is under way.

    Args:
        path: the folder; made if absent.
        config: JSON-able configuration.
        again: remove all results of an earlier run in the folder. Files that no run writes stay.
        threads: threads that the run computes with, see `threads_of`.
        processes: processes that the run is begun with, see `processes_of`.

    Raises:
        ValueError: as `check_run`.
    """
    check_run(path)
    # The marker goes last: a folder that a crash leaves behind is still known to be a run.
    removed = (*written_in(path), path / RUN_CONFIG_FILE) if again else ()
    _remove((path / DONE_FILE, *removed))
    make_folder(path)
    begun = {"threads": threads, "processes": processes}
    marker = {"format": _FORMAT, **begun, "config": jsonable(config)}
    write_json(path / RUN_CONFIG_FILE, marker)


def written_in(path: Path) -> list[Path]:
    """Return the places of all that a run writes into its folder."""
    return [path / f"{name}{end}" for end in (".work", ".old", "") for name in WRITTEN]


def threads_of(path: Path) -> int | None:
    """Return the number of threads that the run in a folder computes with; None if not recorded."""
    return _begun(path, "threads")


def processes_of(path: Path) -> int | None:
    """Return the processes that the run in a folder was begun with; None if not recorded."""
    return _begun(path, "processes")


def _begun(path: Path, name: str) -> int | None:
    with suppress(FileNotFoundError, ValueError):  # a damaged file is put aside when it is opened
        read_config(path)
        return read_json(path / RUN_CONFIG_FILE).get(name)
    return None


def marks_of(path: Path) -> dict[str, bytes]:
    """Return the files that say which run is in a folder and whether it is finished."""
    files = [path / name for name in (RUN_CONFIG_FILE, DATA_FILE, DONE_FILE)]
    return {one.name: one.read_bytes() for one in files if one.exists()}


def put_back(path: Path, marks: Mapping[str, bytes]) -> None:
    """Make a folder that of an earlier run again, which `marks_of` told of."""
    for name, content in marks.items():
        write_bytes(path / name, content)


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of the run in folder `path`.

    Raises:
        FileNotFoundError: `path` is not a run folder.
        ValueError: its config.json was not written by grasp-lora.
    """
    stored = read_json(path / RUN_CONFIG_FILE)
    known = isinstance(stored, dict) and stored.get("format") == _FORMAT
    if not known or not isinstance(stored.get("config"), dict):
        raise ValueError(
            f"{shown_path(path / RUN_CONFIG_FILE)} was not written by grasp-lora; "
            "set another output for the run"
        )
    return stored["config"]


def finish_run(path: Path, names: Sequence[str] = ()) -> None:
    """Mark the run as finished. Call it last, because the marker says that the run is complete.

    Args:
        path: the run folder.
        names: files of the folder that the marker seals, see `write_sealed`.
    """
    finished = {"finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
    write_sealed(path / DONE_FILE, finished, names)


def write_sealed(
    marker: Path, value: Mapping[str, Any], names: Iterable[str] | None = None
) -> None:
    """Write a marker with a seal of the files that it stands for; they are synced before it.

    Args:
        marker: the file to write.
        value: its content besides the seal; JSON values, of which NaN and infinity are kept.
        names: files relative to the marker's folder; None seals all files in and below it.
    """
    folder = marker.parent
    make_folder(folder)
    names = files_below(folder) - {marker.name} if names is None else set(names)
    sync(folder, names)
    content = sealed(value, folder, names)
    write_text(marker, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def damage(marker: Path) -> dict[str, str]:
    """Return file name -> what is wrong with it; empty where all is as it was written.

    Args:
        marker: a marker, which need not be sealed. If it is damaged itself, only that is told.
    """
    if not marker.is_file():
        return {marker.name: "is missing"}
    files = _sealed_by(marker, stamp(marker))
    return {marker.name: "is damaged"} if files is None else damage_of(marker.parent, files)


@functools.lru_cache(maxsize=4096)
def _sealed_by(marker: Path, _stamped: tuple[int, ...]) -> dict[str, Any] | None:
    """Return file name -> size and hash, as a marker has them; None if the marker is damaged.

    A process looks at the same markers many times, and reads each once as long as its stamp stays.
    """
    try:
        content = read_json(marker)
    except ValueError:
        return None
    return None if broken(content) else content.get(FILES, {})


def damage_in(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the marker that seals a folder, and file name -> what is wrong with it.

    The marker lies in the folder, in the folder above it, as for `adapter/` of a search, or is that
    of the finished run whose result the folder is. There is none for other folders.
    """
    above, below = folder.parent, f"{folder.name}/"
    for marker, start in (
        (folder / STAGE_FILE, ""),
        (above / STAGE_FILE, below),
        (above / DONE_FILE, below),
    ):
        if marker.is_file():
            wrong = damage(marker)
            own = [name for name in wrong if name == marker.name or name.startswith(start)]
            return marker, {name: wrong[name] for name in own}
    return None, {}


def damage_words(found: Mapping[str, str]) -> str:
    """Return what is wrong with the files of a folder, in words; the first three are named."""
    words = [f"{shown_path(name)} {why}" for name, why in found.items()]
    more = f", and {len(words) - 3} more" if len(words) > 3 else ""
    return ", ".join(words[:3]) + more


def put_aside(path: Path, name: str | None = None) -> Path:
    """Rename what is damaged, so that it can be made again; return its new place.

    Args:
        path: a file or folder.
        name: its new name; None adds ".damaged". A number follows if there is one already.
    """
    name = name or f"{path.name}.damaged"
    place, count = path.with_name(name), 1
    while place.exists():
        count += 1
        place = path.with_name(f"{name}-{count}")
    path.rename(place)
    sync_folder(path.parent)
    return place


def files_below(folder: Path) -> set[str]:
    """Return all files in and below a folder, relative to it, with "/" between their parts."""
    return {one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file()}


def sync(folder: Path, names: Iterable[str]) -> None:
    """Bring files and their names to the disk, so that a power cut cannot take them.

    Args:
        folder: the folder that holds them.
        names: the files, relative to the folder.
    """
    folders = {folder}
    for name in names:
        file = folder / name
        _sync_file(file)
        folders |= {one for one in file.parents if one.is_relative_to(folder)}
    for one in folders:
        sync_folder(one)


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk, where the system can: Windows opens no folder.

    Raises:
        OSError: the disk is full, or fails.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and bring their names to the disk.

    Raises:
        NotADirectoryError: a file of this name, or of one above it, is there.
    """
    missing = [one for one in (path, *path.parents) if not one.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path)) from None
    for one in missing:
        sync_folder(one.parent)


def finished_at(path: Path) -> str | None:
    """Return when the run in a folder was finished; None if it is not, or its marker is damaged."""
    marker = path / DONE_FILE
    with suppress(FileNotFoundError, ValueError):
        content = read_json(marker)
        return None if broken(content) else content.get("finished")
    return None


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, see `write_bytes`.

    The bytes of a path that the locale's encoding does not know are written as they are.
    """
    write_bytes(path, text.encode("utf-8", "surrogateescape"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write bytes so that `path` has either the old or the new content at any moment.

    The file has the permissions that the umask gives new files.

    Raises:
        OSError: the file cannot be written; the error names it.
    """
    make_folder(path.parent)
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename = str(path)  # a full disk names no file
        raise
    sync_folder(path.parent)


def touch(path: Path) -> None:
    """Check that a file can be written, by writing an empty one beside its place; nothing stays.

    Raises:
        OSError: it cannot; the error names it.
    """
    made = [one for one in path.absolute().parents if not one.exists()]
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_TEMPORARY}")
    try:
        write_text(beside, "")
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            beside.unlink()
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in a folder and below it.

    The folders that stages work in are left out: a process of a killed plan may live on in one, and
    who takes up its work removes them.
    """
    for place, folders, names in os.walk(folder):
        folders[:] = [one for one in folders if not one.endswith(".work")]
        for name in names:
            if name.startswith(".") and name.endswith(_TEMPORARY):
                Path(place, name).unlink(missing_ok=True)


def follow_umask(folder: Path, like: Path) -> None:
    """Give all files of a folder and below it the permissions of one that was just made.

    Writers of weights make files that only their owner can read, whatever the umask.
    """
    mode = stat.S_IMODE(like.stat().st_mode)
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, see `write_text` and `jsonable`."""
    write_text(path, json.dumps(jsonable(value), indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the value of a JSON file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{shown_path(path)} does not exist; run the stage that writes it first"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown_path(path)} is not JSON ({error}); write it again") from None


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line and replace the file, see `write_text`."""
    lines = (json.dumps(jsonable(record), ensure_ascii=False) + "\n" for record in records)
    write_text(path, "".join(lines))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of all complete lines; a last line without line end is left out.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a complete line is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{shown_path(path)} does not exist; run the stage that writes it first"
        )
    lines = path.read_bytes().split(b"\n")[:-1]
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}:{number} is not JSON ({error}); remove the line, or run the stage again"
            ) from None
    return records


def jsonable(value: Any) -> Any:
    """Return the value in JSON types: paths as text, tuples as lists, NaN and infinity as None."""
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
    """Return the software and machine of a run: package versions, Python, system, CPU cores."""
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


def machine_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names of the machines that the rows of a comparison ran on, each name once.

    `machines` of a row lists the machines of all runs in its price. A row of a single run may have
    `machine` instead.
    """
    names: list[str] = []
    for row in rows:
        one = row.get("machine")
        names += row.get("machines") or ([machine_name(one)] if one else [])
    return list(dict.fromkeys(names))


def machine_name(machine: Mapping[str, Any]) -> str:
    """Return the name of a machine (`workbench.processes.machine`): its GPU, else its processor."""
    return str(machine.get("gpu") or machine.get("cpu"))


def cpu_name() -> str:
    """Return the processor's name, with its bfloat16 instruction set in brackets, if it has one."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    bfloat16 = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    return f"{name} ({bfloat16[0]})" if bfloat16 else name


def peak_memory_bytes() -> int | None:
    """Return the peak resident memory of this process in bytes; None if unknown (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def holds_something(path: Path) -> bool:
    """Return whether a folder holds anything except its lock and temporary files of a crash."""
    names = (child.name for child in path.iterdir())
    return any(name != FOLDER_LOCK and not name.endswith(_TEMPORARY) for name in names)


def protect(inputs: Iterable[Path], removed: Iterable[Path], whole: bool = False) -> None:
    """Check that nothing that is read would be removed or replaced.

    Links, `..` and names that differ in case are seen through: what exists is told by its identity.

    Args:
        inputs: files and folders that are read; those that do not exist are left out.
        removed: what would be removed or replaced; what does not exist is left out.
        whole: also keep what lies within an input.

    Raises:
        ValueError: an input is removed, lies in what is removed or, for `whole`, holds it.
    """
    lost = [one for one in removed if _identities(one)]
    for given in (one for one in inputs if _identities(one)):
        for one in lost:
            if _identities(one) & _line(given) or (whole and _identities(given) & _line(one)):
                raise ValueError(
                    f"{shown_path(one)} would be replaced, but {shown_path(given)} is read from "
                    "there; choose another folder for the results, or move the input elsewhere"
                )


Identity = tuple[int, int]
"""Device and number of a file, which all names of it share."""


def _line(path: Path) -> set[Identity]:
    """Return the identities of a path and of all folders above it, as written and as linked."""
    ends = (Path(os.path.abspath(path)), path.resolve())
    return {i for end in ends for one in (end, *end.parents) for i in _identities(one)}


def _identities(path: Path) -> set[Identity]:
    """Return the identity of a path and that of what it leads to; none if it does not exist."""
    found: set[Identity] = set()
    for look in (path.lstat, path.resolve().stat):
        with suppress(OSError):
            state = look()
            found.add((state.st_dev, state.st_ino))
    return found


def check_disk(path: Path, needed: int) -> None:
    """Check that the disk has enough free space.

    Args:
        path: path that will be written; need not exist yet.
        needed: number of bytes that will be written.

    Raises:
        ValueError: fewer bytes are free.
    """
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"{shown_path(path)} needs about {needed / 1e9:.2f} GB, but only {free / 1e9:.2f} GB "
            "are free; free some space or set another output"
        )


def _has_sealed_mark(path: Path) -> bool:
    """Return whether a run has left a sealed file in a folder, which nobody else writes."""
    for name in (DONE_FILE, TIMES_FILE):
        with suppress(FileNotFoundError, ValueError):
            content = read_json(path / name)
            if not broken(content) and OWN in content:
                return True
    return False


def _sync_file(file: Path) -> None:
    # Windows syncs only what is open for writing.
    handle = os.open(file, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
