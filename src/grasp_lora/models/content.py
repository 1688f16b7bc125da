"""What tells the weights of one base model from others at the same place."""

from pathlib import Path

from grasp_lora.models.backbones import ModelSpec, gguf_source_of
from grasp_lora.models.sources import files_content


def base_content(spec: ModelSpec) -> str | None:
    """Return 16 hex digits of a local base model's files; None for the name of a hub.

    Args:
        spec: which base model; a GGUF file is told by its own digest.
    """
    source = gguf_source_of(spec)
    return source.digest if source is not None else files_content(Path(spec.name).expanduser())
