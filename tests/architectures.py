"""The models that the whole job is tested on, each tiny and random, and those refused by kind."""

import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedModel,
    T5Tokenizer,
)

from grasp_lora.models.modules import model_class
from grasp_lora.tasks.base import TASKS
from grasp_lora.tasks.encoding import EncodedExample, Encoding
from grasp_lora.tasks.prompts import render
from grasp_lora.tasks.records import Example
from helpers import BOS_ID, EOS_ID, PAD_ID, TINY_VOCAB, tiny_tokenizer

WIDTH = 32
WINDOW = 48
"""Tokens that a sliding window holds: fewer than an example has."""

_SPECIAL = {"pad_token_id": PAD_ID, "eos_token_id": EOS_ID, "bos_token_id": BOS_ID}
_SHAPE: Mapping[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": WIDTH // 4,
    "max_position_embeddings": 512,
}
_FALCON_SHAPE = {key: value for key, value in _SHAPE.items() if key != "head_dim"}
_GPT2_SHAPE = {"n_embd": WIDTH, "n_layer": 2, "n_head": 4, "n_positions": 512}
_SPLIT = ("q_proj", "v_proj")
_HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

_DEEPSEEK = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}


@dataclass(frozen=True)
class Architecture:
    """A row of the table "Know which models work".

    Attributes:
        name: what people call the models.
        type: `model_type` of their configuration.
        targets: `lora.target_modules` that the whole job is done with.
        refused: `lora.target_modules` that are refused -> what the error says.
        own: what differs from the usual shape.
        shape: the usual shape.
        tokenizer: makes its tokenizer.
    """

    name: str
    type: str
    targets: tuple[str, ...] = _SPLIT
    refused: Mapping[str, str] = field(default_factory=dict)
    own: Mapping[str, Any] = field(default_factory=dict)
    shape: Mapping[str, Any] = field(default_factory=lambda: _SHAPE)
    tokenizer: Callable[[], Any] = tiny_tokenizer

    def model(self, seed: int = 0) -> PreTrainedModel:
        """Return a random model in float32 and eval mode, whose logits differ clearly."""
        size = max(TINY_VOCAB, len(self.tokenizer()))
        values = {"vocab_size": size} | _SPECIAL | dict(self.shape) | dict(self.own)
        config = AutoConfig.for_model(self.type, **values)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = model_class(config).from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.dim() > 1:
                        weight.normal_(std=0.2)
        return model.eval()

    def save(self, folder: Path) -> Path:
        """Save the model with its tokenizer to `folder`; return it."""
        self.model().save_pretrained(folder)
        self.tokenizer().save_pretrained(folder)
        return folder


@dataclass(frozen=True)
class Other:
    """A kind of model that writes no text, or reads none.

    Attributes:
        name: what people call the models.
        type: `model_type` of their configuration.
        shape: values of a small one.
        saved_by: the class that its `config.json` names.
        kind: what the refusal calls it.
    """

    name: str
    type: str
    shape: Mapping[str, Any]
    saved_by: str
    kind: str

    def save(self, folder: Path) -> Path:
        """Save a configuration without weights to `folder`; return it."""
        config = AutoConfig.for_model(self.type, vocab_size=TINY_VOCAB, **self.shape)
        config.architectures = [self.saved_by]
        config.save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        return folder


_NONE = "matches no linear module"
_FUSED = "are fused into one tensor"

ARCHITECTURES = (
    Architecture("Llama", "llama"),
    Architecture("Mistral", "mistral", own={"sliding_window": WINDOW}),
    Architecture("Qwen 2 and 2.5", "qwen2"),
    Architecture("Qwen 3", "qwen3"),
    Architecture("Gemma 2", "gemma2", own={"query_pre_attn_scalar": 8} | _HALF_SLIDING),
    Architecture("Gemma 3", "gemma3_text", own={"query_pre_attn_scalar": 8} | _HALF_SLIDING),
    Architecture("Phi 3", "phi3", ("qkv_proj",), {"q_proj": _NONE}, own={"sliding_window": WINDOW}),
    Architecture("GPT-2", "gpt2", ("c_attn",), {"q_proj": _NONE}, shape=_GPT2_SHAPE),
    Architecture("GPT-NeoX, Pythia", "gpt_neox", ("query_key_value",), {"q_proj": _NONE}),
    Architecture("Falcon", "falcon", ("query_key_value",), {"q_proj": _NONE}, shape=_FALCON_SHAPE),
    Architecture("OLMo 2", "olmo2"),
    Architecture("Granite", "granite"),
    Architecture("Cohere", "cohere"),
    Architecture("SmolLM 3", "smollm3"),
    Architecture(
        "Mixtral",
        "mixtral",
        refused={"w1": _FUSED},
        own={"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    Architecture(
        "Qwen 1.5 and 2 MoE",
        "qwen2_moe",
        ("q_proj", "v_proj", "up_proj"),
        own=_EXPERTS | {"shared_expert_intermediate_size": 16},
    ),
    Architecture("Qwen 3 MoE", "qwen3_moe", refused={"up_proj": _FUSED}, own=_EXPERTS),
    Architecture(
        "DeepSeek V3",
        "deepseek_v3",
        ("q_b_proj", "kv_b_proj"),
        {"q_proj": _NONE, "up_proj": _FUSED, "all-linear": _FUSED},
        own=_DEEPSEEK,
    ),
)

_NAMED = ["<s>", "<pad>", "</s>", "<unk>", "\u2581"]
_LETTERS = [*_NAMED, *string.digits, *string.ascii_letters, *string.punctuation, *"áéíóúñ¿¡"]


def t5_tokenizer() -> T5Tokenizer:
    """Return a tokenizer of letters, which puts an end token behind a text, as T5 does."""
    named = ["<pad>", "</s>", "<unk>"]
    pieces = [*named, *(piece for piece in _LETTERS if piece not in _NAMED[:4])]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0)


def mbart_tokenizer() -> MBartTokenizer:
    """Return a tokenizer of letters, which puts the language behind a text, as mBART does."""
    return MBartTokenizer(vocab=[(piece, 0.0) for piece in _LETTERS])


def mbart50_tokenizer() -> MBart50Tokenizer:
    """Return a tokenizer of letters, which puts the language ahead of a text, as mBART-50 does."""
    return MBart50Tokenizer(vocab=[(piece, 0.0) for piece in _LETTERS])


def nllb_tokenizer() -> NllbTokenizer:
    """Return a tokenizer of letters that knows the languages of NLLB."""
    return NllbTokenizer(vocab={piece: at for at, piece in enumerate(_LETTERS)}, merges=[])


_T5_SHAPE = {
    "d_model": WIDTH,
    "d_kv": WIDTH // 4,
    "d_ff": WIDTH,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_BART_SHAPE = {
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": WIDTH,
    "decoder_ffn_dim": WIDTH,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,  # a tied random model writes what it reads
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_ALL_BART = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")

ENCODER_DECODERS = (
    Architecture(
        "T5",
        "t5",
        ("q", "k", "v", "o", "wi", "wo"),
        {"q_proj": _NONE},
        shape=_T5_SHAPE,
        tokenizer=t5_tokenizer,
    ),
    Architecture(
        "mT5",
        "mt5",
        ("q", "v"),
        {"q_proj": _NONE},
        {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _T5_SHAPE,
        t5_tokenizer,
    ),
    Architecture("mBART", "mbart", shape=_BART_SHAPE, tokenizer=mbart_tokenizer),
    Architecture("mBART-50", "mbart", shape=_BART_SHAPE, tokenizer=mbart50_tokenizer),
    Architecture("NLLB", "m2m_100", _ALL_BART, shape=_BART_SHAPE, tokenizer=nllb_tokenizer),
)


@dataclass(frozen=True)
class Asked:
    """A question in Spanish, as transformers' own tokenizer writes its prompt and its answer.

    Attributes:
        prompt: token ids of the prompt, with all that the tokenizer adds.
        target: token ids of the answer, with all that the tokenizer adds.
        row: the question as this library encodes it.
    """

    prompt: tuple[int, ...]
    target: tuple[int, ...]
    row: EncodedExample


def spanish_questions(one: Architecture, count: int = 4) -> list[Asked]:
    """Return questions of different lengths, with answers of different lengths."""
    tokenizer, task = one.tokenizer(), TASKS["qa"]
    start = one.model().generation_config.decoder_start_token_id
    found: list[Asked] = []
    for n in range(count):
        fields = {"context": "La casa tiene " + "tres " * (n + 1), "question": "Como?" * (4 - n)}
        answer = "tres salas"[: 3 + 2 * (n % 3)]
        example = Example(f"q{n}", f"q{n}", "es", fields, (answer,))
        encoding = Encoding(task, tokenizer, 400, decoder_start=start)
        (row,) = encoding.rows([example])
        if hasattr(tokenizer, "src_lang"):
            code = {NllbTokenizer: "spa_Latn"}.get(type(tokenizer), "es_XX")
            tokenizer.src_lang = tokenizer.tgt_lang = code
        read = tokenizer(render(task, example).text)["input_ids"]
        target = tokenizer(text_target=answer)["input_ids"]
        found.append(Asked(tuple(read), tuple(target), row))
    return found


_TINY_WHISPER = {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 1}

OTHERS = (
    Other(
        "Whisper",
        "whisper",
        _TINY_WHISPER,
        "WhisperForConditionalGeneration",
        "an encoder-decoder that reads no text",
    ),
    Other("BERT", "bert", _SHAPE, "BertForMaskedLM", "a masked language model"),
    Other("XLM-R", "xlm-roberta", _SHAPE, "XLMRobertaForMaskedLM", "a masked language model"),
)

_REASONS = {_NONE: "no such layer", _FUSED: "the experts are one tensor"}


def table() -> str:
    """Return the table of models as the docs have it."""
    lines = [
        "| models | `model_type` | `lora.target_modules` | refused by name |",
        "|---|---|---|---|",
    ]
    for one in (*ARCHITECTURES, *ENCODER_DECODERS):
        why: dict[str, list[str]] = {}
        for targets, said in one.refused.items():
            why.setdefault(_REASONS[said], []).append(f"`{targets}`")
        refused = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in why.items())
        targets = ", ".join(f"`{name}`" for name in one.targets)
        lines.append(f"| {one.name} | `{one.type}` | {targets} | {refused or '-'} |")
    lines += [f"| {one.name} | `{one.type}` | - | the model: {one.kind} |" for one in OTHERS]
    return "\n".join(lines) + "\n"
