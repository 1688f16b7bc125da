"""Adapters and merged models as GGUF files, which llama.cpp and Ollama read.

A tensor is named by gguf's map of names. llama.cpp has the rows of q and k of llama models in
another order, so the rows of B, or of a delta, are put into that order too. An adapter file has one
rank and an alpha equal to it, so that every reader uses a scale of 1 (llama.cpp: alpha / rank of
the tensor). A merged file is a copy of the base's GGUF file in which the changed tensors alone are
replaced.
"""

import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grasp_lora.adapters.attach import FactorPair
from grasp_lora.base.words import shown, shown_path
from grasp_lora.sharing.factors import Ready

ADAPTER_FILE, MODEL_FILE = "adapter.gguf", "model.gguf"

_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "gpt2": "GPT2",
    "phi3": "PHI3",
}
"""transformers' model type -> gguf's architecture, where linear layers are copied as they are or,
with q and k of llama, row by row."""
_PERMUTED = ("q_proj", "k_proj")


@dataclass(frozen=True)
class Layout:
    """How a base model's linear layers lie in a GGUF file.

    Attributes:
        kind: transformers' model type.
        blocks: number of blocks.
        heads, key_heads: heads of queries, and of keys and values.
    """

    kind: str
    blocks: int
    heads: int
    key_heads: int

    @property
    def architecture(self) -> str:
        """Name of gguf's architecture."""
        return _ARCHITECTURES[self.kind]

    def in_order(self, module: str, rows: Tensor) -> Tensor:
        """Return rows [out, ...] of a module's weight, or of its B, in the order of the file.

        Raises:
            ValueError: the rows are not those of so many heads.
        """
        name = module.rsplit(".", 1)[-1]
        if self.architecture != "LLAMA" or name not in _PERMUTED:
            return rows
        heads = self.heads if name == "q_proj" else self.key_heads
        if rows.shape[0] % (2 * heads):
            raise ValueError(
                f"{module} has {rows.shape[0]} rows, which the base model's {heads} heads do not "
                "divide; give the base model of the adapter with --model"
            )
        halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)

    def out_of_order(self, module: str, rows: Tensor) -> Tensor:
        """Return what `in_order` was given."""
        places = self.in_order(module, torch.arange(rows.shape[0]))
        return rows[torch.argsort(places)]


def layout_of(config: Any) -> Layout:
    """Return the layout for the configuration of a base model.

    Raises:
        ValueError: the package gguf is missing, or models of this type have another layout.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("writing .gguf files needs the package gguf; run: pip install gguf")
    text = config.get_text_config()
    if text.model_type not in _ARCHITECTURES:
        raise ValueError(
            f"models of type {shown(text.model_type)} cannot be written as GGUF here, only "
            f"{', '.join(_ARCHITECTURES)}; give --to peft or --to merged"
        )
    heads = text.num_attention_heads
    return Layout(
        text.model_type,
        text.num_hidden_layers,
        heads,
        getattr(text, "num_key_value_heads", None) or heads,
    )


def tensor_names(layout: Layout, modules: Mapping[str, Any]) -> dict[str, str]:
    """Return module -> name of its weight in a GGUF file.

    Raises:
        ValueError: a module has no name there.
    """
    gguf: Any = importlib.import_module("gguf")
    architecture = gguf.MODEL_ARCH[layout.architecture]
    names = gguf.get_tensor_name_map(architecture, layout.blocks)
    found = {module: names.get_name(module) for module in modules}
    lost = sorted(module for module, name in found.items() if name is None)
    if lost:
        raise ValueError(
            f"GGUF files of {layout.architecture} have no tensor for {lost[0]} ({len(lost)} such "
            "modules); give --to peft or --to merged"
        )
    return {module: f"{name}.weight" for module, name in found.items()}


def write_gguf_adapter(out: Path, ready: Ready, layout: Layout, dtype: torch.dtype) -> None:
    """Write `adapter.gguf`.

    Args:
        out: an existing folder.
        ready: the factors.
        layout: of the base model.
        dtype: number format of the factors.
    """
    gguf: Any = importlib.import_module("gguf")
    names = tensor_names(layout, ready.pairs)
    writer = gguf.GGUFWriter(out / ADAPTER_FILE, gguf.MODEL_ARCH_NAMES[_architecture(layout)])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(ready.rank))
    for module, (A, B) in ready.pairs.items():
        _add(writer, f"{names[module]}.lora_a", A, dtype)
        _add(writer, f"{names[module]}.lora_b", layout.in_order(module, B), dtype)
    _finish(writer)


def _architecture(layout: Layout) -> Any:
    gguf: Any = importlib.import_module("gguf")
    return gguf.MODEL_ARCH[layout.architecture]


def _add(writer: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    gguf: Any = importlib.import_module("gguf")
    if dtype == torch.bfloat16:
        kind = gguf.GGMLQuantizationType.BF16
        plain = tensor.float().contiguous().numpy()
        writer.add_tensor(name, gguf.quants.quantize(plain, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor.to(dtype).contiguous().numpy())


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf_adapter(
    out: Path, layout: Layout, modules: Mapping[str, Any]
) -> dict[str, FactorPair]:
    """Return module -> (A, B) of `adapter.gguf`, in the order of the base model's own rows."""
    tensors = _tensors(out / ADAPTER_FILE)
    return {
        module: (
            _plain(tensors[f"{name}.lora_a"]),
            layout.out_of_order(module, _plain(tensors[f"{name}.lora_b"])),
        )
        for module, name in tensor_names(layout, modules).items()
    }


def _tensors(file: Path) -> dict[str, Any]:
    gguf: Any = importlib.import_module("gguf")
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def _plain(tensor: Any) -> Tensor:
    """Return a tensor of a GGUF file in float32."""
    gguf: Any = importlib.import_module("gguf")
    plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    return torch.from_numpy(plain.copy()).float()


def write_gguf_merged(
    out: Path, base: Path, ready: Ready, layout: Layout, dtype: torch.dtype
) -> None:
    """Write `model.gguf`: the base's file, with the delta added to the tensors that have one.

    Those tensors get the number format `dtype`; all others keep the bytes they have.

    Args:
        out: an existing folder.
        base: the GGUF file of the base model.
        ready: the factors.
        layout: of the base model.
        dtype: number format of the changed tensors.

    Raises:
        ValueError: the file lacks a tensor, or has it in another shape.
    """
    gguf: Any = importlib.import_module("gguf")
    reader = gguf.GGUFReader(base)
    deltas = dict(_deltas(ready, layout))
    lost = sorted(deltas.keys() - {tensor.name for tensor in reader.tensors})
    if lost:
        raise ValueError(f"{shown_path(base)} has no tensor {lost[0]}; give the base's own file")
    kind = bytes(reader.fields[gguf.Keys.General.ARCHITECTURE].parts[-1]).decode()
    writer = gguf.GGUFWriter(out / MODEL_FILE, kind)
    writer.data_alignment = reader.alignment
    for field in reader.fields.values():
        # The writer has set these, and the reader makes those of the header up.
        if field.name.startswith("GGUF.") or field.name == gguf.Keys.General.ARCHITECTURE:
            continue
        inner = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        if tensor.name not in deltas:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        plain, delta = _plain(tensor), deltas[tensor.name]
        if plain.shape != delta.shape:
            raise ValueError(
                f"{shown_path(base)} has {tensor.name} as {list(plain.shape)}, not "
                f"{list(delta.shape)}; give the base's own file"
            )
        _add(writer, tensor.name, plain + delta, dtype)
    _finish(writer)


def _deltas(ready: Ready, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    names = tensor_names(layout, ready.pairs)
    for module, (A, B) in ready.pairs.items():
        yield names[module], layout.in_order(module, B) @ A


def merged_error(out: Path, base: Path, ready: Ready, layout: Layout) -> float:
    """Return the relative error of the deltas that `model.gguf` holds, in the Frobenius norm."""
    before, after = _tensors(base), _tensors(out / MODEL_FILE)
    apart = whole = 0.0
    for name, delta in _deltas(ready, layout):
        held = _plain(after[name]).double() - _plain(before[name]).double()
        apart += float((held - delta).square().sum())
        whole += float(delta.double().square().sum())
    return (apart / whole) ** 0.5 if whole else apart**0.5
