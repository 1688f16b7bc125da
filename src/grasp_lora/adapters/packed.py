"""The file of an adapter in fewer bytes, beside its plain PEFT file: `quantized.safetensors`.

It has every module in its own rank and number format, so it is as large as its numbers are. The
plain file has the same factors in bf16, filled up with zeros to one rank, and is what other tools
read.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grasp_lora.adapters.attach import FactorPair
from grasp_lora.base.words import shown_path
from grasp_lora.core.packing import Packed

QUANTIZED_FILE = "quantized.safetensors"
_MODULES = "modules"
"""Key of the file's metadata: module -> [format, inputs, outputs], as JSON."""
_DAMAGE = (SafetensorError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)


def write_packed(folder: Path, modules: Mapping[str, Packed]) -> None:
    """Write the file of the modules into an existing folder.

    Args:
        folder: an adapter folder.
        modules: full module name -> its factors.
    """
    tensors = {
        f"{module}.{name}": tensor
        for module, own in modules.items()
        for name, tensor in own.tensors.items()
    }
    about = {module: [own.form, own.inputs, own.outputs] for module, own in modules.items()}
    save_file(tensors, folder / QUANTIZED_FILE, metadata={_MODULES: json.dumps(about)})


def load_quantized(folder: str | Path) -> dict[str, FactorPair]:
    """Return the factors of an adapter that `grasp-lora shrink` wrote, from its smaller file.

    They equal those of `adapter_model.safetensors` bit for bit, without the zeros that fill the
    modules of that file up to one rank.

    Args:
        folder: the adapter folder; of its files `quantized.safetensors` alone is read.

    Returns:
        Full module name in the base model -> (A [rank, in], B [out, rank]) in bf16, with a LoRA
        scaling of 1.

    Raises:
        FileNotFoundError: the folder has no such file.
        ValueError: the file is damaged.
    """
    file = Path(folder).expanduser() / QUANTIZED_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{shown_path(file)} is not there; give a folder that grasp-lora shrink wrote"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            about = json.loads((opened.metadata() or {})[_MODULES])
            tensors: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}
        return {
            module: Packed(form, _of(module, tensors), inputs, outputs).factors()
            for module, (form, inputs, outputs) in about.items()
        }
    except (
        SafetensorError,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        RuntimeError,
    ) as error:
        raise ValueError(
            f"{shown_path(file)} is damaged, or not of grasp-lora shrink ({error}); copy it again"
        ) from error


def _of(module: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{module}."
    return {n.removeprefix(start): one for n, one in tensors.items() if n.startswith(start)}
