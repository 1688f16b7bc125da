"""Read the bytes and the text of a file, unpacked if it is compressed."""

import bz2
import gzip
import lzma
import re
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

BOM = b"\xef\xbb\xbf"
LFS_POINTER = b"version https://git-lfs.github.com/spec"
OTHER_MARKS: Mapping[bytes, str] = MappingProxyType(
    {
        # UTF-32 first, because its mark begins with that of UTF-16.
        b"\xff\xfe\x00\x00": "UTF-32",
        b"\x00\x00\xfe\xff": "UTF-32",
        b"\xff\xfe": "UTF-16",
        b"\xfe\xff": "UTF-16",
    }
)
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def _unpack_zstd(data: bytes) -> bytes:
    import pyarrow

    with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
        return stream.read()


# A file is told by its first bytes: a download may have unpacked it and kept the name.
_UNPACKERS: tuple[tuple[re.Pattern[bytes], str, Callable[[bytes], bytes]], ...] = (
    (re.compile(rb"\x1f\x8b"), "gzip", gzip.decompress),
    (re.compile(rb"BZh[1-9]1AY&SY"), "bzip2", bz2.decompress),
    (re.compile(rb"\xfd7zXZ\x00"), "xz", lzma.decompress),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "zstd", _unpack_zstd),
)
_DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError)


def data_suffix(path: Path) -> str:
    """Return the suffix of a file name in lower case, such as ".csv" also for "a.csv.gz"."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in PACKED_SUFFIXES else suffix


def bytes_of(path: Path) -> bytes:
    """Return the bytes of a file; those of a gzip, bzip2, xz or zstd file are unpacked.

    Raises:
        ValueError: the file is compressed and damaged, or needs a package that is missing.
    """
    data = path.read_bytes()
    for mark, name, unpack in _UNPACKERS:
        if not mark.match(data):
            continue
        try:
            return unpack(data)
        except ModuleNotFoundError:
            raise ValueError(f"{path}: zstd needs pyarrow; run `pip install pyarrow`") from None
        except _DAMAGED as error:
            raise ValueError(
                f"{path} is a damaged {name} file ({error}); fetch or pack it again"
            ) from None
    return data


def text_of(path: Path) -> str:
    """Return the text of a UTF-8 file without its byte order mark; see `bytes_of`.

    Raises:
        ValueError: the file is empty, damaged, a Git LFS pointer, or not UTF-8.
    """
    data = bytes_of(path)
    if data.startswith(LFS_POINTER):
        raise ValueError(f"{path} is a Git LFS pointer, not the data; fetch it with `git lfs pull`")
    advice = "save it as UTF-8, for instance with `iconv -f {} -t UTF-8 OLD > NEW`"
    for mark, name in OTHER_MARKS.items():
        if data.startswith(mark):
            raise ValueError(
                f"{path} is not UTF-8: it begins with the byte order mark of {name}; "
                + advice.format(name)
            )
    if (zero := data.find(0)) >= 0:
        raise ValueError(
            f"{path} is not a UTF-8 text: it holds the byte 0x00 at offset {zero}, as UTF-16 "
            "and archives do; " + advice.format("UTF-16LE") + " or unpack it"
        )
    start = len(BOM) if data.startswith(BOM) else 0
    try:
        text = data[start:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = start + error.start
        line = data.count(b"\n", 0, offset) + 1
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset} (line {line}); "
            + advice.format("WINDOWS-1252")
            + " (with the file's own encoding after -f)"
        ) from None
    if not text.strip():
        raise ValueError(f"{path} is empty; it needs at least one row")
    return text
