"""An export for Python: an adapter in, a folder for another program out."""

from dataclasses import dataclass
from pathlib import Path

from grasp_lora.sharing.export import Request, write_export


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        folder: the folder; `serve.txt` in it has the command that serves it.
        told: what there is to say: what was trimmed away, and how far the result, loaded again, is
            from the adapter.
    """

    folder: Path
    told: tuple[str, ...]


def export(
    adapter: str | Path,
    to: str,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    rank: int | None = None,
    tolerance: float | None = None,
    model: str | None = None,
    public_name: str | None = None,
) -> Exported:
    """Write an adapter in the form that another program reads, load it again and compare.

    Args:
        adapter: a PEFT LoRA folder.
        to: `peft`, a folder to share, with one rank and no patterns; `merged`, the base model with
            the adapter in its weights; `gguf` for llama.cpp; `gguf-merged`, a copy of the base's
            GGUF file; `mlx` for mlx-lm.
        out: the folder to write; absent or empty.
        dtype: number format of what is written: `bfloat16`, `float16` or `float32`.
        rank: trim every module to this rank, by singular values; None keeps the adapter whole.
        tolerance: trim to the lowest rank that loses at most this share of any module's delta, in
            [0, 1); None does not trim.
        model: the base model; None takes the one that the adapter names. `peft` and `mlx` do not
            read it.
        public_name: hub id of the base model, owner/name, for the written adapter; None keeps the
            one that the adapter names.

    Returns:
        The result: `.folder`, `.told`.

    Raises:
        FileNotFoundError, ValueError: the folder holds no plain LoRA adapter, an argument is wrong,
            the target cannot hold the adapter, or the place is taken. Nothing is left behind.
    """
    told: list[str] = []
    request = Request(
        Path(adapter), to, Path(out), dtype, rank, tolerance, model=model, public_name=public_name
    )
    return Exported(write_export(request, told.append), tuple(told))
