"""Tiny random models, a byte tokenizer and adapter folders: everything a test needs, offline."""

import copy
import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconH1Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from grasp_lora.models.cache import cache_folder
from grasp_lora.models.sources import SHORT_NAMES
from grasp_lora.workbench import fit

TINY_VOCAB = 272
PAD_ID, EOS_ID, BOS_ID = 256, 257, 258
ARCHITECTURES = ("llama", "gpt2", "gemma3_text", "qwen3")
DEFAULT_TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "gpt2": ("c_attn", "c_fc"),
    "gemma3_text": ("q_proj", "v_proj"),
    "qwen3": ("q_proj", "v_proj"),
}


_SAVE_FIGURE = Figure.savefig


@contextmanager
def drawing() -> Iterator[None]:
    """Draw pictures again, which the tests otherwise leave empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", _SAVE_FIGURE)
        yield


def tiny_config(
    arch: str = "llama",
    vocab: int = TINY_VOCAB,
    layers: int = 2,
    width: int = 16,
    tie: bool | None = None,
) -> PreTrainedConfig:
    """Return the config of a random causal LM of `layers` blocks and hidden size `width`.

    `tie` None keeps the family's own rule for the output layer (tied for gpt2 and gemma3_text).
    """
    special = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "bos_token_id": BOS_ID}
    tied = {} if tie is None else {"tie_word_embeddings": tie}
    if arch == "gpt2":
        return GPT2Config(
            vocab_size=vocab,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            n_positions=512,
            **special,
            **tied,
        )
    shared = {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        **special,
        **tied,
    }
    if arch == "llama":
        return LlamaConfig(**shared)
    if arch == "qwen3":
        return Qwen3Config(head_dim=width // 2, **shared)
    if arch == "gemma3_text":
        return Gemma3TextConfig(
            head_dim=width // 2, query_pre_attn_scalar=width // 2, sliding_window=64, **shared
        )
    raise ValueError(f"no tiny model for {arch=}; choose one of {ARCHITECTURES}")


def random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """Return a float32 model with random weights, in eval mode; the global generator is kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_model(
    arch: str = "llama",
    vocab: int = TINY_VOCAB,
    seed: int = 0,
    layers: int = 2,
    width: int = 16,
    tie: bool | None = None,
) -> PreTrainedModel:
    """Return a random causal LM in float32 and eval mode; the same seed gives the same weights.

    The global generator is left as it was. Weights are large enough for logits to differ clearly.
    """
    config = tiny_config(arch, vocab, layers, width, tie)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
    return model.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer: one token a byte (ids 0..255), then <pad>, <eos>, <bos>."""
    vocab = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        clean_up_tokenization_spaces=False,
    )
    special = (fast.pad_token_id, fast.eos_token_id, fast.bos_token_id)
    if special != (PAD_ID, EOS_ID, BOS_ID):
        raise AssertionError(f"the special tokens moved: {special}")
    return fast


def tiny_backbone_folder(folder: Path, arch: str = "llama", **settings: object) -> Path:
    """Save a tiny model (`settings` as in tiny_model) with its tokenizer to `folder`; return it."""
    tiny_model(arch, **settings).save_pretrained(folder)  # type: ignore[arg-type]
    tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_peft_model(
    model: PreTrainedModel,
    r: int = 4,
    alpha: float = 8,
    targets: Sequence[str] | str | None = None,
    seed: int = 0,
    zero_b: bool = False,
    **config: object,
) -> PeftModel:
    """Return a PEFT LoRA over a copy of `model`, A and B random (B zero if asked).

    `config` goes to LoraConfig (use_rslora, rank_pattern, alpha_pattern, bias, ...).
    """
    arch = model.config.model_type
    chosen = targets if isinstance(targets, str) else list(targets or DEFAULT_TARGETS[arch])
    lora = LoraConfig(
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]
        target_modules=chosen,
        fan_in_fan_out=arch == "gpt2",
        task_type="CAUSAL_LM",
        **config,  # type: ignore[arg-type]
    )
    with torch.random.fork_rng(devices=[]):
        peft_model = get_peft_model(copy.deepcopy(model), lora)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in peft_model.modules():
            if not isinstance(module, LoraLayer):
                continue
            for factor in (*module.lora_A.values(), *module.lora_B.values()):
                factor.weight.normal_(std=0.2, generator=generator)
            if zero_b:
                for factor in module.lora_B.values():
                    factor.weight.zero_()
    return peft_model.eval()


def tiny_adapter_folder(
    folder: Path,
    model: PreTrainedModel,
    r: int = 4,
    alpha: float = 8,
    targets: Sequence[str] | str | None = None,
    seed: int = 0,
    use_rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    zero_b: bool = False,
    **config: object,
) -> Path:
    """Save a random LoRA adapter for `model` as a plain PEFT folder; return the folder."""
    peft_model = tiny_peft_model(
        model,
        r,
        alpha,
        targets,
        seed,
        zero_b,
        use_rslora=use_rslora,
        rank_pattern=dict(rank_pattern or {}),
        alpha_pattern=dict(alpha_pattern or {}),
        **config,
    )
    peft_model.save_pretrained(folder)
    return folder


def random_ids(rows: int = 2, length: int = 12, vocab: int = 256, seed: int = 0) -> torch.Tensor:
    """Return random token ids [rows, length] below `vocab`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (rows, length), generator=generator)


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Return the model's logits [rows, length, vocab] for `ids`, without gradients."""
    with torch.no_grad():
        return model(input_ids=ids).logits


def tiny_bloom_model(seed: int = 0, width: int = 16) -> PreTrainedModel:
    """Return a random causal LM whose forward takes no `position_ids` (ALiBi), as `tiny_model`."""
    config = BloomConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=width,
        n_layer=2,
        n_head=2,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=BOS_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.2)
    return model.eval()


def tiny_gemma4_model(seed: int = 0) -> PreTrainedModel:
    """Return a random Gemma 4, whose last layers use the keys and values of earlier ones."""
    config = Gemma4TextConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2,
        sliding_window=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        global_head_dim=8,
        vocab_size_per_layer_input=TINY_VOCAB,
        hidden_size_per_layer_input=8,
    )
    return random_model(config, seed)


def tiny_recurrent_model(seed: int = 0) -> PreTrainedModel:
    """Return a random Falcon H1 of one layer, which has a state beside its attention."""
    config = FalconH1Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        mamba_d_ssm=16,
        mamba_n_heads=2,
        mamba_d_head=8,
        mamba_d_state=4,
    )
    return random_model(config, seed)


def tiny_vision_model(seed: int = 0) -> PreTrainedModel:
    """Return a random Gemma 3 with its vision tower, which has a q_proj and a v_proj as well."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = Gemma3Config(
        text_config=tiny_config("gemma3_text").to_dict(),
        vision_config=vision | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=260,
        boi_token_index=261,
        eoi_token_index=262,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=BOS_ID,
    )
    return random_model(config, seed)


def tiny_mixture_model(seed: int = 0) -> PreTrainedModel:
    """Return a random Mixtral of two layers and two experts, which are fused into one tensor."""
    config = MixtralConfig(
        vocab_size=TINY_VOCAB,
        hidden_size=16,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
        num_experts_per_tok=2,
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        bos_token_id=BOS_ID,
    )
    return random_model(config, seed)


def mixture_adapter_folder(folder: Path, rank: int = 2) -> Path:
    """Write a LoRA adapter of `tiny_mixture_model` with the names of transformers 4."""
    targets = {"w1": (16, 8), "w3": (16, 8), "w2": (8, 16)}
    config = LoraConfig(r=rank, target_modules=list(targets), task_type="CAUSAL_LM")
    config.inference_mode = True
    config.save_pretrained(str(folder))
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        for expert in range(2):
            for name, (inputs, outputs) in targets.items():
                place = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                for side, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                    key = f"base_model.model.{place}.lora_{side}.weight"
                    tensors[key] = torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


@functools.cache
def packaged_tokenizer(name: str) -> Any:
    """Return the tokenizer of a packaged backbone, read from its GGUF file where none is cached.

    Skips the test if the package of an optional extra is not installed.
    """
    folders = sorted((cache_folder() / "backbones").glob(f"{name}-*"))
    if folders:
        return AutoTokenizer.from_pretrained(folders[0])
    try:
        source = SHORT_NAMES[name]()
    except ValueError as error:
        pytest.skip(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        file = source.assemble(Path(scratch))
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def rows_trained(patch: pytest.MonkeyPatch) -> list[Any]:
    """Return a list that receives every encoded example that a training reads from now on."""
    read: list[Any] = []
    plain = fit._timed

    def noted(collate: Any, clock: Any) -> Any:
        batch = plain(collate, clock)
        return lambda rows: (read.extend(rows), batch(rows))[1]

    patch.setattr(fit, "_timed", noted)
    return read
