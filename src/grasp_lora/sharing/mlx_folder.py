"""An adapter as mlx-lm reads it: `adapters.safetensors` with A and B transposed, and a scale of 1.

mlx-lm puts LoRA on the modules `keys` of all blocks. Where the adapter has no factors it keeps its
own start, whose B is zero.
"""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from grasp_lora.adapters.attach import FactorPair
from grasp_lora.base.files import write_json
from grasp_lora.sharing.factors import Ready

_IN_A_BLOCK = re.compile(r"model\.layers\.\d+\.(?P<key>.+)")


def write_mlx(out: Path, ready: Ready, dtype: torch.dtype) -> None:
    """Write the folder.

    Args:
        out: an existing empty folder.
        ready: the factors.
        dtype: number format of the factors.

    Raises:
        ValueError: a module is in none of the model's blocks.
    """
    found = {name: _IN_A_BLOCK.fullmatch(name) for name in ready.pairs}
    outside = sorted(name for name, match in found.items() if match is None)
    if outside:
        raise ValueError(
            f"mlx-lm puts LoRA on blocks named model.layers.N alone, not on {outside[0]}; give "
            "--to merged in place of it"
        )
    keys = sorted({match["key"] for match in found.values() if match is not None})
    tensors = {
        f"{name}.lora_{side}": factor.T.to(dtype).contiguous()
        for name, pair in ready.pairs.items()
        for side, factor in zip("ab", pair, strict=True)
    }
    save_file(tensors, out / "adapters.safetensors", metadata={"format": "mlx"})
    scaled = {"rank": ready.rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
    about = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": scaled}
    write_json(out / "adapter_config.json", about)


def read_mlx(folder: Path) -> dict[str, FactorPair]:
    """Return module -> (A, B) of a folder that `write_mlx` wrote."""
    tensors = load_file(folder / "adapters.safetensors")
    names = sorted(key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a"))
    return {n: (tensors[f"{n}.lora_a"].T.float(), tensors[f"{n}.lora_b"].T.float()) for n in names}
