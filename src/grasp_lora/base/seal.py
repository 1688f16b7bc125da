"""Seals: the size and the hash of every file, kept in the marker that is written last.

A marker says that what lies beside it is whole. Its seal says what that was, so that a file that
was lost, cut short or changed since is found before it is read. A marker also has a hash of its own
content. Markers of earlier versions have no seal: what they mark is read as it is.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FILES, OWN = "files", "sha256"
"""Entries of a sealed marker: file name -> size and hash; hash of the marker's other entries."""
_BLOCK = 1 << 20


def sealed(value: Mapping[str, Any], folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Return the content of a marker with its seal.

    Args:
        value: the content without the seal; JSON values.
        folder: the folder of the marker.
        names: files to seal, relative to the folder, with "/" between their parts.
    """
    found = {name: _of(folder / name) for name in sorted(names)}
    whole = json.dumps(dict(value) | ({FILES: found} if found else {}), ensure_ascii=False)
    # As it will be read: names are texts then, and so are bytes that Python kept of a path.
    as_read = json.loads(whole.encode("utf-8", "surrogateescape"))
    return as_read | {OWN: _own(as_read)}


def broken(marker: Any) -> bool:
    """Return whether the content of a marker is not as it was written; JSON values."""
    if not isinstance(marker, dict):
        return True
    if OWN not in marker:
        return FILES in marker
    return marker[OWN] != _own({name: one for name, one in marker.items() if name != OWN})


def damage_of(folder: Path, files: Mapping[str, Any]) -> dict[str, str]:
    """Return file name -> what is wrong with it, for files that a marker seals.

    Args:
        folder: the folder of the marker.
        files: file name -> size and hash, as the marker has them.
    """
    found = {name: _fault(folder / name, one) for name, one in files.items()}
    return {name: fault for name, fault in found.items() if fault}


def stamp(file: Path) -> tuple[int, ...]:
    """Return what changes when a file is written: its inode, time of change in ns, and bytes."""
    found = file.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _of(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def _fault(file: Path, written: Mapping[str, Any]) -> str:
    if not file.is_file():
        return "is missing"
    size = file.stat().st_size
    if size != written["bytes"]:
        return f"has {size} bytes, not {written['bytes']}"
    return "" if digest_of(file) == written["sha256"] else "has another content"


def digest_of(file: Path) -> str:
    """Return the SHA-256 of a file, 64 hex digits; a process reads an unchanged file once."""
    return _read(file, stamp(file))


@functools.lru_cache(maxsize=4096)
def _read(file: Path, _stamped: tuple[int, ...]) -> str:
    """Return the hash of a file, which a process reads once as long as its stamp stays."""
    return _digest(file)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _own(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
