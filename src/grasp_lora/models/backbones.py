"""Load frozen base models by short name, folder, hub id or GGUF file."""

import gc
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from grasp_lora.base.words import shown, shown_path, without_home
from grasp_lora.models.attention import use_short_attention
from grasp_lora.models.cache import Notice, converted_backbone, progress_bars_hidden
from grasp_lora.models.devices import (
    DTYPES,
    avoid_faulty_kernels,
    choose_device,
    choose_dtype,
    use_repeatable_kernels,
)
from grasp_lora.models.example_losses import rank_and_size
from grasp_lora.models.memory import MemoryPlan, plan_config_memory
from grasp_lora.models.modules import (
    base_fingerprint,
    copy_output_layer_inputs,
    forward_accepts,
    keep_fingerprint,
    model_class,
    output_embeddings,
    resolve_targets,
    similar_names,
    vocabulary_size,
)
from grasp_lora.models.norms import use_fused_norms
from grasp_lora.models.shards import shard, shards_wanted
from grasp_lora.models.sources import SHORT_NAMES, GgufSource, gguf_source
from grasp_lora.models.vocabulary import check_tokens

__all__ = [
    "Backbone",
    "MemoryPlan",
    "ModelSpec",
    "base_fingerprint",
    "choose_device",
    "choose_dtype",
    "copy_output_layer_inputs",
    "forward_accepts",
    "load_backbone",
    "plan_memory",
    "quantization_config",
    "resolve_targets",
]

_QUANTIZATIONS: dict[str, Callable[[torch.dtype], BitsAndBytesConfig | None]] = {
    "none": lambda dtype: None,
    "8bit": lambda dtype: BitsAndBytesConfig(load_in_8bit=True),
    "4bit": lambda dtype: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    ),
}


_ENDS = "what ends an answer of {}"


@dataclass(frozen=True)
class ModelSpec:
    """The base model to load and the settings it is loaded with.

    Raises:
        ValueError: a setting has an unknown value; the message lists the allowed ones.
    """

    name: str
    """A short name ("smollm2", "gemma3-270m"), a folder, a hub id, or a .gguf file.

    The file may be local, or one on the hub: "owner/name/file.gguf".
    """

    dtype: str = "auto"
    """Number format; "auto" means bfloat16 if the hardware multiplies it natively, else float32."""

    quantization: Literal["none", "8bit", "4bit"] = "none"
    """Size of the frozen weights. Needs CUDA and bitsandbytes; gives a backbone no fingerprint."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: saves memory, takes about a third more time."""

    attn_implementation: str | None = None
    """transformers' attention ("sdpa", "eager", "flash_attention_2", ...); None lets it choose."""

    trust_remote_code: bool = False
    """Run the code that a hub model ships. Set it only for models you trust."""

    device: str = "auto"
    """Device name; "auto" means CUDA if there is any, else the CPU."""

    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    public_name: str | None = None
    """Name of the model on a hub, for adapters that go out; None takes `name` if it is one."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError(
                f"model name is empty; give a folder, a hub id or one of {_short_names()}"
            )
        if self.dtype != "auto" and self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be 'auto' or one of {list(DTYPES)}, got {shown(self.dtype)}"
            )
        if self.quantization not in _QUANTIZATIONS:
            raise ValueError(
                f"quantization must be one of {list(_QUANTIZATIONS)}, got "
                f"{shown(self.quantization)}"
            )


@dataclass(frozen=True, eq=False)
class Backbone:
    """A loaded base model, frozen and in eval mode, with its tokenizer and token ids.

    Attributes:
        model: the base model.
        tokenizer: its tokenizer.
        public_name: the name that reports and records have for the base model, with `~` for the
            home folder. For packaged backbones it is the hub id, not a local path.
        base_name: the public name that adapters record; None where only a path is known.
        gguf: the GGUF file that the weights were dequantised from; None for other models.
        fingerprint: `base_fingerprint` of the weights; None if they are quantized or float16.
        dtype: number format of the weights and activations.
        device: device of the model.
        stop_ids: ids of the tokens that end a generation, in ascending order.
        pad_id: id of the padding token. It may equal a stop token, so do not derive labels from it.
        given_template: chat template that the tokenizer was given, in place of the base model's.
        decoder_start: id of the token that the decoder of an encoder-decoder begins with, unless
            that is the language of the answer; None for causal language models.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    public_name: str
    fingerprint: str | None
    dtype: torch.dtype
    device: torch.device
    stop_ids: tuple[int, ...]
    pad_id: int
    given_template: str | None = None
    base_name: str | None = None
    gguf: GgufSource | None = None
    decoder_start: int | None = None

    @property
    def encoder_decoder(self) -> bool:
        """Whether prompts are read by an encoder, and answers written by a decoder.

        Such a model shares no beginnings of examples, packs none into a row, and has transformers'
        own attention.
        """
        return self.decoder_start is not None

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding; the tokenizer may have more tokens."""
        return vocabulary_size(self.model)


def _ignore(message: str) -> None:
    del message


def load_backbone(spec: ModelSpec, notice: Notice = _ignore) -> Backbone:
    """Load a base model, freeze it, and load its tokenizer.

    Args:
        spec: the model and its settings.
        notice: called with messages for the user.

    Raises:
        FileNotFoundError: a folder or file that `spec` names is missing.
        ValueError: the model cannot be found or read, its package is not installed, the
            hardware does not support a setting of `spec`, or a token that ends an answer has no
            row in the embedding.
    """
    device = choose_device(spec.device)
    dtype = choose_dtype(spec.dtype, device)
    _check_quantization(spec, device)
    sharded = shards_wanted()
    avoid_faulty_kernels(device)
    use_repeatable_kernels(device)
    location, public_name, base_name = _locate(spec, notice)
    # Shards are moved to the device one by one: it may not hold the whole model.
    model = _load_model(spec, location, dtype, torch.device("cpu") if sharded else device)
    tokenizer = _call_hub(AutoTokenizer.from_pretrained, spec, location)
    pad_id = _ensure_padding(tokenizer, vocabulary_size(model), public_name, notice)
    model.requires_grad_(False)
    model.eval()
    if model.generation_config is not None:
        model.generation_config.pad_token_id = pad_id
    if spec.gradient_checkpointing:
        _checkpoint_activations(model)
    if output_embeddings(model) is not None:
        copy_output_layer_inputs(model)
    if spec.attn_implementation is None:
        use_short_attention(model)
    use_fused_norms(model)
    stop_ids = _stop_ids(model.generation_config, tokenizer)
    check_tokens(stop_ids, tokenizer, vocabulary_size(model), _ENDS.format(public_name))
    start = _decoder_start(model.config, model.generation_config, public_name)
    fingerprint = keep_fingerprint(model) if sharded else base_fingerprint(model)
    if sharded:
        shard(model, device)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        public_name=public_name,
        fingerprint=fingerprint,
        dtype=dtype,
        device=device,
        stop_ids=stop_ids,
        pad_id=pad_id,
        base_name=base_name,
        gguf=gguf_source_of(spec),
        decoder_start=start,
    )


def _checkpoint_activations(model: Any) -> None:
    old, new = "gradient_checkpointing_enable", "activation_checkpointing_enable"  # of transformers
    # The re-entrant form would need inputs that require gradients; a frozen model has none.
    getattr(model, new if hasattr(model, new) else old)({"use_reentrant": False})


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how bitsandbytes stores weights, or None for whole weights.

    Args:
        quantization: "none", "8bit" or "4bit".
        dtype: number format of the products.
    """
    return _QUANTIZATIONS[quantization](dtype)


class Unloaded(NamedTuple):
    """What is known of a base model without its weights.

    Attributes:
        tokenizer: its tokenizer.
        name: the public name.
        vocabulary: size of the vocabulary; None if the model's configuration names none.
        decoder_start: as in `Backbone`.
    """

    tokenizer: PreTrainedTokenizerBase
    name: str
    vocabulary: int | None
    decoder_start: int | None


def load_tokenizer(spec: ModelSpec, notice: Notice = _ignore) -> Unloaded:
    """Return the tokenizer of a base model, and what else is known without weights.

    Raises:
        FileNotFoundError: see `load_backbone`.
        ValueError: see `load_backbone`.
    """
    location, public_name, _ = _locate(spec, notice)
    config = _text_config(spec, location)
    tokenizer = _call_hub(AutoTokenizer.from_pretrained, spec, location)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    generation = _generation_config(spec, location, config)
    if vocabulary is not None:
        stop_ids = _stop_ids(generation, tokenizer)
        check_tokens(stop_ids, tokenizer, vocabulary, _ENDS.format(public_name))
    start = _decoder_start(config, generation, public_name)
    return Unloaded(tokenizer, public_name, vocabulary, start)


def load_model_config(spec: ModelSpec, notice: Notice = _ignore) -> Any:
    """Return transformers' configuration of a base model, without weights.

    Raises:
        FileNotFoundError, ValueError: see `load_backbone`.
    """
    return _text_config(spec, _locate(spec, notice)[0])


def _text_config(spec: ModelSpec, location: str) -> Any:
    """Return the configuration of a model, once it is known to be one that writes text.

    transformers would load an encoder as if it were causal.
    """
    config = _call_hub(AutoConfig.from_pretrained, spec, location)
    named = getattr(config, "architectures", None) or ()
    if config.is_encoder_decoder and shards_wanted():
        raise ValueError(
            f"the model {shown(spec.name)} ({config.model_type}) is an encoder-decoder, which "
            "is not cut into shards here; launch without FSDP"
        )
    if config.is_encoder_decoder:
        if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING or _brings_code(config):
            return config
        kind = "an encoder-decoder that reads no text"
    elif any(name.endswith("ForMaskedLM") for name in named):
        kind = "a masked language model"
    elif type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or _brings_code(config):
        return config
    else:
        kind = "of a kind that transformers loads as no causal language model"
    raise ValueError(
        f"the model {shown(spec.name)} ({config.model_type}) is {kind}; only causal language "
        "models and encoder-decoders of text can be used here"
    )


def _brings_code(config: Any) -> bool:
    return model_class(config).__name__ in (getattr(config, "auto_map", None) or {})


def _generation_config(spec: ModelSpec, location: str, config: Any) -> GenerationConfig:
    """Return what transformers gives the loaded model as its `generation_config`."""
    try:
        return GenerationConfig.from_pretrained(location, revision=spec.revision or "main")
    except OSError:  # a model need not have the file
        return GenerationConfig.from_model_config(config)


def _decoder_start(config: Any, generation: GenerationConfig | None, name: str) -> int | None:
    """Return the id that the decoder of an encoder-decoder begins with; None for other models.

    Raises:
        ValueError: it is an encoder-decoder that names none.
    """
    if not config.is_encoder_decoder:
        return None
    # transformers generates with the start of a text where no start of the decoder is named.
    for key in ("decoder_start_token_id", "bos_token_id"):
        for one in (generation, config):
            found = getattr(one, key, None)
            if found is not None:
                return int(found)
    raise ValueError(
        f"{name} is an encoder-decoder that does not say how its decoder begins; set "
        "decoder_start_token_id in its generation_config.json"
    )


def _check_quantization(spec: ModelSpec, device: torch.device) -> None:
    if spec.quantization == "none":
        return
    if shards_wanted():
        raise ValueError(
            f"quantization={shown(spec.quantization)} packs weights into bytes, which FSDP cannot "
            "cut into shards; launch without FSDP (each process then holds the whole quantized "
            "model), or set quantization='none'"
        )
    if device.type != "cuda":
        raise ValueError(
            f"quantization={shown(spec.quantization)} needs a CUDA device, but this run uses "
            f"{device}; set quantization='none'"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            f"quantization={shown(spec.quantization)} needs bitsandbytes; run: pip install "
            "'grasp-lora[quantization]'"
        )


def _short_names() -> str:
    return ", ".join(SHORT_NAMES)


def gguf_source_of(spec: ModelSpec) -> GgufSource | None:
    """Return the GGUF source that `spec` names, or None if it names a folder or a hub id."""
    if spec.name in SHORT_NAMES:
        return SHORT_NAMES[spec.name]()
    if spec.name.endswith(".gguf"):
        path, parts = Path(spec.name), spec.name.split("/")
        if path.exists() or path.parent.is_dir() or not _on_hub(parts):
            return gguf_source(path)
        file = _call_hub(_download, spec, spec.name)
        return replace(gguf_source(file), public_name=spec.name)
    return None


def _on_hub(parts: Sequence[str]) -> bool:
    """Return whether the parts of a path can name a file of a hub repository."""
    return len(parts) > 2 and all(part not in ("", ".", "..", "~") for part in parts)


def _download(location: str, revision: str | None, trust_remote_code: bool) -> Path:
    """Return the local copy of a hub file; `location` is "owner/name/file"."""
    del trust_remote_code  # a GGUF file holds no code
    owner, name, file = location.split("/", 2)
    found = cached_file(f"{owner}/{name}", file, revision=revision)
    assert found is not None, "a missing file raises"
    return Path(found)


def _locate(spec: ModelSpec, notice: Notice) -> tuple[str, str, str | None]:
    """Return (folder or hub id to load from, name in reports, name in adapters that go out)."""
    source = gguf_source_of(spec)
    if source is not None:
        place, named = str(converted_backbone(source, notice)), source.public_name
        local = spec.name not in SHORT_NAMES and Path(spec.name).is_file()
        return place, spec.public_name or named, spec.public_name or (None if local else named)
    folder = Path(spec.name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").is_file()
            raise FileNotFoundError(
                f"{shown_path(folder)} holds a PEFT adapter and no model; give the base model of "
                "that adapter"
                if adapter
                else f"{shown_path(folder)} has no config.json, so it is not a transformers model; "
                "give a folder that save_pretrained wrote"
            )
        return str(folder), spec.public_name or without_home(spec.name), spec.public_name
    name = spec.public_name or spec.name
    return spec.name, name, name


def _call_hub(load: Callable[..., Any], spec: ModelSpec, location: str, **settings: Any) -> Any:
    try:
        with progress_bars_hidden(), _garbage_collection_paused():
            return load(
                location,
                revision=spec.revision,
                trust_remote_code=spec.trust_remote_code,
                **settings,
            )
    except SafetensorError as error:
        raise ValueError(
            f"a weights file of {shown(spec.name)} is damaged or cut short ({error}); copy or "
            "download it again"
        ) from error
    except ImportError as error:
        raise ValueError(
            f"the model {shown(spec.name)} cannot be loaded with the packages installed here "
            f"({_first_line(error)}); install the missing package with pip, or use the model in "
            "another format"
        ) from error
    except OSError as error:
        raise ValueError(
            f"the model {shown(spec.name)} cannot be loaded: {_load_problem(spec, location, error)}"
        ) from error


def _load_problem(spec: ModelSpec, location: str, error: OSError) -> str:
    if Path(location).is_dir():
        return (
            f"the folder does not hold a complete model ({_first_line(error)}). Give a folder that "
            "save_pretrained wrote, with config, weights and tokenizer"
        )
    near = similar_names(spec.name, list(SHORT_NAMES))
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return (
        f"there is no such folder, and the hub did not provide it ({_first_line(error)}){hint} "
        f"Check the name and the network, or use one of {_short_names()}"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


@contextmanager
def _garbage_collection_paused() -> Iterator[None]:
    """Switch garbage collection off for the body.

    Reading a large vocabulary creates a million live objects. Scanning them again and again takes
    40 % of the reading time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# transformers puts an adapter that lies beside a model's own weights on it, unasked. It looks for
# the adapter in this subfolder instead.
_NO_ADAPTER = {"subfolder": "no-adapter"}


def _load_model(
    spec: ModelSpec, location: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    config = _text_config(spec, location)
    settings: dict[str, Any] = {"dtype": dtype, "adapter_kwargs": _NO_ADAPTER}
    if spec.attn_implementation is not None:
        settings["attn_implementation"] = spec.attn_implementation
    quantization = quantization_config(spec.quantization, dtype)
    if quantization is not None:
        settings |= {"quantization_config": quantization, "device_map": {"": device}}
    model = _call_hub(model_class(config).from_pretrained, spec, location, **settings)
    return model if quantization is not None else model.to(device)


def _ensure_padding(
    tokenizer: PreTrainedTokenizerBase, vocabulary: int, name: str, notice: Notice
) -> int:
    """Set and return the padding token's id: the end token's if padding has no embedding row."""
    pad, end = (_id_within(vocabulary, i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id))
    if pad is not None:
        return pad
    if end is None:
        raise ValueError(
            f"the tokenizer of {name} has neither a padding nor an end token among the model's "
            f"{vocabulary} tokens; add one with tokenizer.add_special_tokens, resize the model's "
            "embeddings and save both"
        )
    if tokenizer.pad_token_id is not None:
        notice(
            f"the padding token of {name} ({shown(tokenizer.pad_token)}, id "
            f"{tokenizer.pad_token_id}) is beyond the model's vocabulary of {vocabulary} tokens; "
            f"the end token ({shown(tokenizer.eos_token)}) is used for padding"
        )
    tokenizer.pad_token = tokenizer.eos_token
    return end


def _id_within(vocabulary: int, token: Any) -> int | None:
    return int(token) if token is not None and int(token) < vocabulary else None


def _stop_ids(
    generation: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[int, ...]:
    named = [tokenizer.eos_token_id, generation.eos_token_id if generation is not None else None]
    ids: set[int] = set()
    for entry in named:
        if isinstance(entry, int):
            ids.add(entry)
        elif entry is not None:
            ids.update(int(token) for token in entry)
    return tuple(sorted(ids))


def plan_memory(
    spec: ModelSpec,
    notice: Notice = _ignore,
    *,
    rank: int = 16,
    batch_size: int = 1,
    length: int = 1024,
) -> MemoryPlan:
    """Return a memory estimate for training LoRA on `spec`, from the model's config alone.

    It is that of one process, which may hold a share of the weights (`models.shards`).
    Quantization without CUDA is accepted here, since the plan may be for another machine.

    Args:
        spec: the model and its settings.
        notice: called with messages for the user.
        rank: LoRA rank.
        batch_size: examples per forward pass.
        length: tokens per example.

    Raises:
        FileNotFoundError: see `load_backbone`.
        ValueError: see `load_backbone`.
    """
    location, *_ = _locate(spec, notice)
    config = _text_config(spec, location)
    dtype = choose_dtype(spec.dtype, choose_device(spec.device))
    plan = plan_config_memory(
        config,
        dtype=dtype,
        quantization=spec.quantization,
        gradient_checkpointing=spec.gradient_checkpointing,
        trust_remote_code=spec.trust_remote_code,
        rank=rank,
        batch_size=batch_size,
        length=length,
    )
    parts = rank_and_size()[1] if shards_wanted() else 1
    return replace(plan, weights=plan.weights // parts)
