"""What tells the weights of one base model from others at the same place."""

import hashlib
from pathlib import Path

from grasp_lora.models.backbones import ModelSpec, gguf_source_of

_END_BYTES = 1 << 20
_SAMPLES, _SAMPLE_BYTES = 256, 4096
_FILES = (".safetensors", ".gguf", ".bin", ".json", ".jinja")
_OF_AN_ADAPTER = "adapter_"


def base_content(spec: ModelSpec) -> str | None:
    """Return 16 hex digits of a local base model's files; None for the name of a hub.

    Args:
        spec: which base model; a GGUF file is told by its own digest.
    """
    source = gguf_source_of(spec)
    return source.digest if source is not None else files_content(Path(spec.name).expanduser())


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
