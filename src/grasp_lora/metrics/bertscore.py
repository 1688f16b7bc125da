"""Compute BERTScore with the package bert-score; record encoder, truncation and settings."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from grasp_lora.base.words import shown
from grasp_lora.metrics.records import Family, Measured, Options, Row, mean_measured
from grasp_lora.metrics.segment import base_language

if TYPE_CHECKING:
    from bert_score import BERTScorer
    from transformers import PreTrainedConfig

_NAME = "bertscore_f1"
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_T5_TYPES = ("t5", "mt5", "umt5")
_SHORTEST_INPUT = 3  # two special tokens and one token of the text


@dataclass(frozen=True)
class _Encoder:
    scorer: "BERTScorer"
    tokenizer: Any
    longest: int
    """Maximum number of tokens of the encoder, special tokens included."""

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Return the tokens per text, special tokens not counted; 0 for invisible texts."""
        stripped = [text.strip() for text in texts]
        # Not verbose, because texts that are too long are counted below.
        found = self.tokenizer(stripped, add_special_tokens=False, verbose=False)
        return [len(ids) for ids in found["input_ids"]]


def _model_name(options: Options) -> str:
    from bert_score.utils import lang2model

    return options.bertscore_model or lang2model[base_language(options.language)]


def _layer(name: str, options: Options) -> int | None:
    from bert_score.utils import model2layers

    if options.bertscore_layer is not None:
        return options.bertscore_layer
    # A folder is taken for the model whose name it has, which bert-score may list as owner/name.
    by_folder = {key.rpartition("/")[2]: layer for key, layer in model2layers.items()}
    return model2layers.get(name, by_folder.get(Path(name).name))


def _baseline(name: str, options: Options) -> Path:
    """Return the path of bert-score's baseline file; few languages and encoders have one."""
    import bert_score

    folder = Path(bert_score.__file__).parent / "rescale_baseline"
    return folder / base_language(options.language) / f"{name}.tsv"


@lru_cache(maxsize=1)  # only one encoder stays in memory
def _encoder(name: str, layer: int, device: str, baseline_language: str | None) -> _Encoder:
    from bert_score import BERTScorer

    scorer = BERTScorer(
        model_type=name,
        num_layers=layer,
        device=device,
        lang=baseline_language,
        rescale_with_baseline=baseline_language is not None,
        # transformers 5 has only fast tokenizers; the package writes this into its hash.
        use_fast_tokenizer=True,
    )
    # The package has no public access to these, nor to its maximum length.
    tokenizer, model = scorer._tokenizer, scorer._model
    return _Encoder(scorer, tokenizer, min(tokenizer.model_max_length, _positions(model)))


def _positions(model: Any) -> int:
    """Return the longest input that a model has position embeddings for, in tokens."""
    found = [2**31]
    for name, module in model.named_modules():
        if name.endswith(("position_embeddings", "embed_positions")) and hasattr(module, "weight"):
            # RoBERTa counts positions from after the padding index, BART from an offset.
            padding = getattr(module, "padding_idx", None)
            skipped = getattr(module, "offset", 0 if padding is None else padding + 1)
            found.append(module.weight.shape[0] - skipped)
    return min(found)


def _measure(rows: Sequence[Row], options: Options) -> dict[str, Measured]:
    name = _model_name(options)
    layer = _layer(name, options)
    if layer is None:
        raise ValueError(_unknown_layer(name))
    language = base_language(options.language) if options.bertscore_rescale else None
    encoder = _encoder(name, layer, options.device, language)
    longest = min(options.bertscore_max_length, encoder.longest)
    scores, truncated = _scores(rows, encoder, longest, options.batch_size)
    settings = {
        "what": "mean F1 over rows, best reference; 0 where a text is empty",
        "model": name,
        "layer": layer,
        "language": options.language,
        "rescale": options.bertscore_rescale,
        "baseline": f"{language}/{name}.tsv" if language else None,
        "idf": False,
        "max_length": longest,
        "truncated_texts": truncated,
        "package": f"bert-score {version('bert-score')}",
        "transformers": version("transformers"),
        "hash": encoder.scorer.hash,
    }
    return {_NAME: mean_measured(scores, settings)}


def _scores(
    rows: Sequence[Row], encoder: _Encoder, longest: int, batch_size: int
) -> tuple[np.ndarray, int]:
    """Return the F1 of each row in percent, and the number of distinct truncated texts."""
    texts = list(dict.fromkeys(text for row in rows for text in (row.prediction, *row.references)))
    lengths = dict(zip(texts, encoder.lengths(texts), strict=True))
    # With an empty text, the package calls a method that transformers 5 does not have, and it warns
    # about texts without tokens. Neither can be compared.
    references = [[text for text in row.references if lengths[text]] for row in rows]
    scored = [i for i, row in enumerate(rows) if lengths[row.prediction] and references[i]]
    scores = np.zeros(len(rows))
    if scored:
        encoder.tokenizer.model_max_length = longest
        with warnings.catch_warnings():
            # The package reads its baselines with pandas, whose arrays are read-only for torch.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            _, _, f1 = encoder.scorer.score(
                [rows[i].prediction for i in scored],
                [references[i] for i in scored],
                batch_size=batch_size,
            )
        # The cosine of a vector with itself may exceed 1 by a rounding error.
        scores[scored] = np.minimum(100 * np.asarray(f1, np.float64), 100.0)
    room = longest - encoder.tokenizer.num_special_tokens_to_add()
    return scores, sum(length > room for length in lengths.values())


def _missing(options: Options) -> str | None:
    if find_spec("bert_score") is None:
        return "the package bert-score is not installed; pip install 'grasp-lora[metrics]'"
    if options.bertscore_max_length < _SHORTEST_INPUT:
        return (
            f"bertscore_max_length is {options.bertscore_max_length}, but it must be at least "
            f"{_SHORTEST_INPUT}; raise it"
        )
    from transformers.utils import hub

    name = _model_name(options)
    if name.startswith("scibert"):
        return (
            f"bert-score would download {shown(name)} with a shell command; "
            "set bertscore_model to 'allenai/scibert_scivocab_uncased'"
        )
    # transformers passes on the errors of httpx, such as the refusal of a proxy.
    faults = (OSError, ValueError, hub.httpx.HTTPError)  # pyright: ignore[reportPrivateImportUsage]
    try:
        config = _config(name)
    except faults as fault:
        reason = str(fault).strip().partition("\n")[0].rstrip(".")
        return (
            f"the encoder {shown(name)} cannot be read ({reason}); set bertscore_model to a folder "
            "with an encoder, or to a model name that is in the cache or can be downloaded"
        )
    return _type_fault(name, config) or _layer_fault(name, config, options)


def _config(name: str) -> "PreTrainedConfig":
    """Return the encoder's configuration from its folder, from the cache, or from the hub.

    Raises:
        FileNotFoundError: none of them has the encoder with weights.
        OSError, ValueError: transformers cannot read a file or the name.
    """
    from transformers import AutoConfig
    from transformers.utils.hub import has_file

    for local in (True, False):
        # This query does not retry like a download, so it returns at once when offline.
        if has_file(name, "config.json", local_files_only=local):
            if not any(has_file(name, file, local_files_only=local) for file in _WEIGHTS):
                continue
            return AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    raise FileNotFoundError("neither a folder nor the cache nor the hub has it with weights")


def _type_fault(name: str, config: "PreTrainedConfig") -> str | None:
    if "t5" not in name or config.model_type in _T5_TYPES:
        return None
    return (
        f"bert-score takes every name with 't5' for a T5 encoder, but {shown(name)} is a "
        f"{config.model_type} model; move its folder to a path without 't5'"
    )


def _layer_fault(name: str, config: "PreTrainedConfig", options: Options) -> str | None:
    layer, deepest = _layer(name, options), getattr(config, "num_hidden_layers", None)
    if layer is None:
        return _unknown_layer(name, deepest)
    if options.bertscore_layer is not None and not 1 <= layer <= (deepest or layer):
        return (
            f"bertscore_layer is {layer}, but {shown(name)} has the layers 1 to {deepest}; set one"
        )
    if options.bertscore_rescale and not _baseline(name, options).is_file():
        return (
            f"bert-score has no baseline for {shown(name)} in "
            f"{shown(base_language(options.language))}, so it cannot rescale; set "
            "bertscore_rescale to false"
        )
    return None


def _unknown_layer(name: str, deepest: int | None = None) -> str:
    return (
        f"bert-score has no recommended layer for {shown(name)}; take an encoder that it lists, in "
        "a folder of the same name, or with grasp-lora score set bertscore_layer "
        f"(1 to {deepest or 'N'})"
    )


BERTSCORE = Family((_NAME,), _measure, _missing)
"""BERTScore F1 in percent; rescaled scores may be negative."""
