"""Write an adapter in the form that another program reads, load it again and compare.

The result is written beside its place and renamed, so a folder that is there is complete.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from grasp_lora.adapters.attach import FactorPair
from grasp_lora.adapters.chat import given_template, put_template
from grasp_lora.adapters.folder import LoadedAdapter, adapter_in, check_fits, read_adapter
from grasp_lora.adapters.opening import is_path, model_with_adapter, named_base_model
from grasp_lora.base.files import (
    ENCODER_DECODER_TASK,
    files_below,
    follow_umask,
    make_folder,
    read_json,
    sync,
    write_json,
    write_text,
)
from grasp_lora.base.words import shown, shown_path
from grasp_lora.config.sections import at_home, hub_id
from grasp_lora.core.lora import LoraFactors
from grasp_lora.models.backbones import ModelSpec, gguf_source_of, load_backbone, load_model_config
from grasp_lora.models.devices import DTYPES
from grasp_lora.models.modules import base_modules, both_sides, model_class
from grasp_lora.report.card import SERVED_RANKS, served_rank
from grasp_lora.sharing.factors import Ready, check_range, difference, ready
from grasp_lora.sharing.gguf_files import (
    ADAPTER_FILE,
    MODEL_FILE,
    layout_of,
    merged_error,
    read_gguf_adapter,
    write_gguf_adapter,
    write_gguf_merged,
)
from grasp_lora.sharing.mlx_folder import read_mlx, write_mlx
from grasp_lora.sharing.peft_folder import write_peft

Say = Callable[[str], None]
SERVE_FILE = "serve.txt"
_FOR_ENCODER_DECODERS = ("peft", "merged")
"""Targets that hold an adapter of an encoder-decoder."""
_READ = "The quick brown fox jumps over the lazy dog. 1, 2, 3."
"""The text whose logits are compared."""


@dataclass(frozen=True)
class Request:
    """What to write.

    Attributes:
        adapter: a PEFT LoRA folder.
        to: a key of `TARGETS`.
        out: the folder to write; absent or empty.
        dtype: number format of what is written.
        rank: rank to trim to; None keeps the adapter whole.
        tolerance: largest relative error of a module when trimming; None does not trim.
        model: the base model; None takes the one that the adapter names.
        public_name: hub id of the base model for the written adapter; None keeps the one named.
    """

    adapter: Path
    to: str
    out: Path
    dtype: str = "bfloat16"
    rank: int | None = None
    tolerance: float | None = None
    model: str | None = None
    public_name: str | None = None

    @property
    def spec(self) -> ModelSpec:
        """The base model, to be loaded in float32 on the CPU."""
        name = named_base_model(self.adapter) if self.model is None else at_home(self.model)
        return ModelSpec(name, "float32", device="cpu")


@dataclass(frozen=True)
class _Job:
    """A request with the adapter that was read for it; results go to `out`."""

    request: Request
    loaded: LoadedAdapter
    ready: Ready
    out: Path
    say: Say

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.request.dtype]

    @property
    def encoder_decoder(self) -> bool:
        return self.loaded.config.get("task_type") == ENCODER_DECODER_TASK

    @property
    def base_name(self) -> str | None:
        """The public name of the base model; None where only a path is known."""
        named = self.request.public_name or self.loaded.base_name
        return None if named is None or is_path(named) or Path(named).exists() else named


def write_export(request: Request, say: Say) -> Path:
    """Write an adapter for another program, load it again, and say how far it is from the adapter.

    Args:
        request: what to write.
        say: called with lines for the user.

    Raises:
        FileNotFoundError, ValueError: the folder holds no plain LoRA adapter, a setting is wrong,
            the target cannot hold the adapter, or the place is taken.
    """
    if request.to not in TARGETS:
        raise ValueError(f"--to {shown(request.to)} is unknown; give one of: {', '.join(TARGETS)}")
    if request.dtype not in DTYPES:
        raise ValueError(f"--dtype {shown(request.dtype)}: give one of: {', '.join(DTYPES)}")
    if request.public_name is not None:
        hub_id(request.public_name)
    out, dtype = request.out.absolute(), DTYPES[request.dtype]
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"{shown_path(request.out)} is there already; choose another folder for --out"
        )
    loaded = read_adapter(request.adapter)
    task = loaded.config.get("task_type")
    if task == ENCODER_DECODER_TASK and request.to not in _FOR_ENCODER_DECODERS:
        raise ValueError(
            f"--to {request.to} writes adapters of causal language models alone, and this one is "
            f"of an encoder-decoder ({task}); give --to {' or --to '.join(_FOR_ENCODER_DECODERS)}"
        )
    made = ready(loaded.adapter, request.rank, request.tolerance)
    for side, name in enumerate(("lora_A", "lora_B")):
        check_range({f"{name} of {m}": pair[side] for m, pair in made.pairs.items()}, dtype)
    for line in _trimmed_lines(made):
        say(line)
    staging = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    make_folder(staging)
    try:
        job = _Job(request, loaded, made, staging, say)
        TARGETS[request.to](job)
        write_text(staging / SERVE_FILE, f"{_serve_line(job)}\n")
        follow_umask(staging, staging / SERVE_FILE)
        sync(staging, files_below(staging))
        if out.exists():
            out.rmdir()
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return request.out


def _trimmed_lines(made: Ready) -> list[str]:
    if not made.lost:
        return []
    lines = [f"trimmed to rank {made.rank}; relative error of each module's delta:"]
    lines += [f"  {name}  {error:.2e}" for name, error in made.lost.items()]
    return [*lines, "a trimmed adapter has no zeros left where the pruned one had some"]


def _peft(job: _Job) -> None:
    source = adapter_in(job.request.adapter)
    write_peft(job.out, source, job.loaded, job.ready, job.dtype, job.base_name)
    _say_difference(job, _pairs(read_adapter(job.out).adapter))
    if job.base_name is None:
        job.say("no base model is named, as no public name is known: give --public-name owner/name")


def _mlx(job: _Job) -> None:
    write_mlx(job.out, job.ready, job.dtype)
    _say_difference(job, read_mlx(job.out))


def _gguf(job: _Job) -> None:
    layout = layout_of(load_model_config(job.request.spec, job.say))
    write_gguf_adapter(job.out, job.ready, layout, job.dtype)
    _say_difference(job, read_gguf_adapter(job.out, layout, job.ready.pairs))


def _gguf_merged(job: _Job) -> None:
    source = gguf_source_of(job.request.spec)
    if source is None:
        raise ValueError(
            "--to gguf-merged changes a copy of the base's own GGUF file: give it with --model "
            "FILE.gguf, or write --to merged and convert that with llama.cpp"
        )
    with TemporaryDirectory() as scratch:
        base = source.assemble(Path(scratch))
        layout = layout_of(AutoConfig.from_pretrained(base.parent, gguf_file=base.name))
        write_gguf_merged(job.out, base, job.ready, layout, job.dtype)
        error = merged_error(job.out, base, job.ready, layout)
    job.say(f"read back: the deltas in the file differ from the adapter's by {error:.2e} of them")


def _merged(job: _Job) -> None:
    request = job.request
    backbone = load_backbone(request.spec, job.say)
    model = backbone.model
    loaded = read_adapter(request.adapter, model)
    check_fits(loaded, model, str(request.adapter))
    put_template(backbone.tokenizer, given_template([request.adapter]))
    ids = backbone.tokenizer(_READ, return_tensors="pt").input_ids
    with model_with_adapter(backbone, request.adapter) as adapted:
        wanted = _log_probabilities(adapted, ids)
    made = ready(loaded.adapter, request.rank, request.tolerance)
    _add_deltas(model, made.pairs)
    check_range(dict(model.named_parameters()), job.dtype)
    nn.Module.to(model, job.dtype)
    model.save_pretrained(job.out)
    _name_rope_as_before(job.out / "config.json")
    backbone.tokenizer.save_pretrained(job.out)
    again = model_class(model.config).from_pretrained(job.out, dtype=torch.float32)
    found = _log_probabilities(again.eval(), ids)
    apart = (wanted.exp() * (wanted - found)).sum(-1)
    same = int((wanted.argmax(-1) == found.argmax(-1)).sum())
    job.say(
        f"loaded again: {float(apart.mean()):.2e} nats (KL) from the adapter on its base in "
        f"float32, the same best token at {same} of {apart.numel()} places"
    )


def _name_rope_as_before(file: Path) -> None:
    """Repeat the base of the rotations where transformers 4 had it: mlx-lm reads no other place."""
    content = read_json(file)
    base = (content.get("rope_parameters") or {}).get("rope_theta")
    if base is not None:
        write_json(file, content | {"rope_theta": base})


def _log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(**both_sides(model, ids)).logits[0].double().log_softmax(-1)


def _add_deltas(model: nn.Module, pairs: Mapping[str, FactorPair]) -> None:
    known = base_modules(model)
    with torch.no_grad():
        for name, (A, B) in pairs.items():
            module, delta = known[name], B @ A
            weight = module.get_parameter("weight")
            weight += (delta.T if isinstance(module, Conv1D) else delta).to(weight)


def _pairs(adapter: Mapping[str, LoraFactors]) -> dict[str, FactorPair]:
    return {name: (one.A, one.scaling * one.B) for name, one in adapter.items()}


def _say_difference(job: _Job, written: Mapping[str, FactorPair]) -> None:
    error = difference(written, _pairs(job.loaded.adapter))
    job.say(f"read back: the deltas differ from the adapter's by {error:.2e} of them")


def _serve_line(job: _Job) -> str:
    """Return the command that serves what was written, from the folder above it."""
    place, base = quote(f"./{job.request.out.name}"), quote(job.base_name or "BASE_MODEL")
    if job.encoder_decoder:
        return "# load it with transformers (AutoModelForSeq2SeqLM) and PEFT: vLLM is not for it"
    if job.request.to == "peft" and job.ready.rank > SERVED_RANKS[-1]:
        return f"# vLLM serves adapters up to rank {SERVED_RANKS[-1]}: trim this one with --rank"
    if job.request.to == "peft":
        return (
            f"vllm serve {base} --enable-lora --max-lora-rank {served_rank(job.ready.rank)} "
            f"--lora-modules adapter={place}"
        )
    return {
        "merged": f"vllm serve {place}",
        "gguf": f"llama-server -m BASE_MODEL.gguf --lora {place}/{ADAPTER_FILE}",
        "gguf-merged": f"llama-server -m {place}/{MODEL_FILE}",
        "mlx": f"mlx_lm.server --model {base} --adapter-path {place}",
    }[job.request.to]


TARGETS: Mapping[str, Callable[[_Job], None]] = {
    "peft": _peft,
    "merged": _merged,
    "gguf": _gguf,
    "gguf-merged": _gguf_merged,
    "mlx": _mlx,
}
"""Target -> function that writes it, loads it again and says the difference."""
