"""The sections of a run's configuration: frozen pydantic models, one default each.

A field's description says what changing it does. Unknown keys are refused, and numbers are never
NaN or infinite. Rules that need two sections at once live in `grasp_lora.config.run_config`.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from grasp_lora.base.words import check_path, shown
from grasp_lora.core.merge_kinds import UNWEIGHTED, Kind

NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


def at_home(path: str) -> str:
    """Return a path or a model's name with `~` replaced by the home folder.

    No shell does that in a YAML file. An unknown ~user stays as written, and the path is then
    reported as missing.

    Raises:
        ValueError: as in `check_path`.
    """
    check_path(path)
    return os.path.expanduser(path)


def hub_id(name: str) -> str:
    """Return the name of a model on a hub as it is.

    Raises:
        ValueError: it cannot be one, because it is a path or holds other characters.
    """
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"{shown(name)} is no hub id; write owner/name")
    return name


_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
LocalPath = Annotated[Path, AfterValidator(lambda path: Path(at_home(str(path))))]


class Section(BaseModel):
    """Base of all sections: immutable, unknown keys refused, NaN and infinity refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelSettings(Section):
    name: Annotated[str, AfterValidator(at_home)] = Field(
        min_length=1,
        description="backbone: smollm2, gemma3-270m, a model folder, a hub id owner/name, or a "
        "GGUF file (a path, or owner/name/file.gguf on the hub)",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="type of the frozen weights; bfloat16 halves memory"
    )
    quantization: Literal["none", "8bit", "4bit"] = Field(
        default="none", description="less memory for the backbone; needs CUDA and bitsandbytes"
    )
    gradient_checkpointing: bool = Field(
        default=False, description="less memory for activations, about a third more time per step"
    )
    attn_implementation: str | None = Field(
        default=None, description="attention kernel, passed on to transformers"
    )
    trust_remote_code: bool = Field(
        default=False, description="run Python code that comes with the model (danger)"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    public_name: Annotated[str, AfterValidator(hub_id)] | None = Field(
        default=None,
        description="hub id of the backbone, owner/name, which adapters name as their base model; "
        "default: model.name if it is one, else none",
    )


class TrainedOn(Section):
    source: LocalPath | None = Field(
        default=None,
        description="file of the rows that the given source adapter was trained on; in the target "
        "data they go into train, never into dev, micro_dev or test",
    )
    target: LocalPath | None = Field(
        default=None, description="the same for the given target adapter"
    )

    def files(self) -> dict[str, Path]:
        """Return role -> file, of those that are given."""
        named = {"source": self.source, "target": self.target}
        return {role: path for role, path in named.items() if path is not None}


class AdapterFolders(Section):
    source: LocalPath | None = Field(
        default=None, description="folder of an existing PEFT adapter; none is trained then"
    )
    target: LocalPath | None = Field(
        default=None, description="folder of an existing PEFT adapter; none is trained then"
    )

    trained_on: TrainedOn = Field(
        default=TrainedOn(), description="rows that given adapters have seen already"
    )

    def folders(self) -> dict[str, Path | None]:
        """Return role -> folder; None for an adapter that is trained."""
        return {"source": self.source, "target": self.target}


class LoraSettings(Section):
    r: PositiveInt = Field(default=8, description="rank of each adapter trained here")
    alpha: Positive = Field(
        default=32, description="scaling is alpha/r; alpha * sqrt(r) gives that of rsLoRA"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.05, description="dropout while training adapters; the merge is trained without"
    )
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] | Literal["all-linear"] = Field(
        default=("q_proj", "v_proj"), description="layers that get an adapter, or all-linear"
    )


class MergeSettings(Section):
    kind: Kind = Field(
        default="cat",
        description="cat: exact sum, ranks add up; linear: published kind, has cross terms; "
        "svd: best low-rank fit of cat; (experimental, without weights) layer-swap: target in the "
        "outer layers, source in the middle; ties-delta: TIES on the deltas",
    )
    weights: tuple[float, ...] | Literal["auto", "unscaled"] | None = Field(
        default=None,
        description="weights of source and target; default: their average; auto: chosen by "
        "probes of the untrained merge; unscaled: 1/scaling of each adapter, which is the sum of "
        "factors without alpha/r that the published code computes",
    )
    rank: PositiveInt | None = Field(default=None, description="rank of the svd merge")
    when: Literal["before", "after"] = Field(
        default="before",
        description="before: merge, then fine-tune the merge on the target examples, as published; "
        "after: fine-tune the source adapter, then merge it with the target adapter; probes give "
        "weights and ratio, and nothing is trained after the merge",
    )

    @model_validator(mode="after")
    def _weights_and_rank(self) -> "MergeSettings":
        given = None if isinstance(self.weights, str) else self.weights
        if given is not None and len(given) != 2:
            raise ValueError(
                f"weights {shown(list(given))} has {len(given)} entries; give two: source and "
                "target"
            )
        if given is not None and not any(given):
            raise ValueError("weights are all 0, which merges nothing; make one of them non-zero")
        if self.rank is not None and self.kind != "svd":
            raise ValueError(
                f"rank {self.rank} has no effect on kind {self.kind}; remove it or set kind: svd"
            )
        return self

    def faults(self, weights: Sequence[float] | None = None) -> list[str]:
        """Return one message for each setting that has no meaning for this kind.

        Args:
            weights: weights that are given in place of those of this section.
        """
        if self.kind not in UNWEIGHTED:
            return []
        stated = self.weights if weights is None else weights
        found: list[str] = []
        if stated is not None:
            given = stated if isinstance(stated, str) else list(stated)
            found.append(
                f"merge.weights: {shown(given)} has no effect on merge.kind {self.kind!r}, which "
                "has no weights; leave them out, or take another kind"
            )
        if self.when == "after":
            found.append(
                f"merge.when: 'after' chooses weights by probes, but merge.kind {self.kind!r} has "
                "none; set merge.when: before, or take another kind"
            )
        return found


class Training(Section):
    """The values of one training; in `train.<training>` only those that differ are given."""

    epochs: PositiveInt = Field(
        default=10, description="passes over the training examples, at most"
    )
    learning_rate: Positive = Field(default=1e-4, description="AdamW step size of the first epoch")
    weight_decay: NonNegative = Field(default=0.0, description="AdamW weight decay")
    lr_decay: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.85, description="the learning rate is multiplied by this after each epoch"
    )
    batch_size: PositiveInt = Field(default=4, description="examples per forward pass")
    accumulation: PositiveInt = Field(default=1, description="forward passes per optimizer step")
    max_steps: PositiveInt | None = Field(default=None, description="optimizer steps, at most")
    save_every: PositiveInt | None = Field(
        default=None, description="optimizer steps between checkpoints; default: once per epoch"
    )
    max_grad_norm: Positive = Field(default=1.0, description="gradients are clipped to this norm")
    order: Literal["by-step", "by-length"] = Field(
        default="by-step",
        description="examples of a step: drawn at random, or of similar length (less padding)",
    )
    patience: PositiveInt | None = Field(
        default=None,
        description="stop after this many epochs without a better dev loss; a search never stops "
        "early",
    )


Role: TypeAlias = Literal["source", "target"]
TrainingName: TypeAlias = Literal["source", "target", "search", "finetune"]

_ADAPTERS: Mapping[str, Any] = {"epochs": 3}
TRAINING_DEFAULTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "restart": {
        "source": _ADAPTERS,
        "target": _ADAPTERS,
        "search": {},
        "finetune": {"patience": 3},
    },
    # Search and final run are one fine-tuning here: together as long as one of them above.
    "continue": {
        "source": _ADAPTERS,
        "target": _ADAPTERS,
        "search": {"epochs": 5},
        "finetune": {"epochs": 5, "patience": 3},
    },
}
"""`finetune.mode` -> training -> its values where they differ from the defaults of `Training`."""


class TrainSettings(Training):
    """Values shared by all trainings, and below them those in which one training differs."""

    source: Training = Field(
        default=Training(), description="keys of `train` that differ for the source adapter"
    )
    target: Training = Field(
        default=Training(), description="keys of `train` that differ for the target adapter"
    )
    search: Training = Field(
        default=Training(),
        description="keys of `train` that differ for the run that learns the ratio",
    )
    finetune: Training = Field(
        default=Training(), description="keys of `train` that differ for the final pruned run"
    )

    @model_validator(mode="after")
    def _search_has_no_patience(self) -> "TrainSettings":
        if self.search.patience is not None:
            raise ValueError(
                f"search.patience {self.search.patience} has no effect, a search runs all its "
                "epochs; remove it"
            )
        return self

    def resolved(self, mode: str) -> "TrainSettings":
        """Return the same settings with every value of every training filled in.

        A value is the one given for the training, else the one given for all, else the built-in
        default of the training, else that of all trainings.

        Args:
            mode: `finetune.mode`, which decides the default epochs of search and final run.
        """
        filled: dict[str, Training] = {}
        for name, defaults in TRAINING_DEFAULTS[mode].items():
            own: Training = getattr(self, name)
            values = {key: getattr(self, key) for key in Training.model_fields}
            values |= {k: v for k, v in defaults.items() if k not in self.model_fields_set}
            values |= {"patience": None} if name == "search" else {}
            values |= {key: getattr(own, key) for key in own.model_fields_set}
            filled[name] = Training(**values)
        return self.model_copy(update=filled)


class FinetuneSettings(Section):
    mode: Literal["restart", "continue"] = Field(
        default="restart",
        description="restart: train the merge again from the start; continue: go on from the best "
        "epoch of the search",
    )
    mask_schedule: Literal["once", "every-step"] | PositiveInt = Field(
        default="once",
        description="when to choose the mask: once, after every step, or every N steps",
    )
    rows: Literal["train", "labelled"] = Field(
        default="train",
        description="train: dev and micro-dev examples only choose; labelled: once they have "
        "chosen ratio, weights and epochs, train again from the start with them included",
    )


class EvaluateSettings(Section):
    batch_size: PositiveInt = Field(default=16, description="prompts generated at once")
    max_new_tokens: PositiveInt | None = Field(
        default=None, description="longest answer in tokens; default: the task's own"
    )
    min_new_tokens: NonNegativeInt = Field(
        default=0,
        description="shortest answer in tokens; 1 keeps a model from answering with nothing",
    )
    beams: PositiveInt = Field(
        default=1, description="1 is greedy; more is beam search, that many times the memory"
    )
    baselines: bool = Field(
        default=True, description="also score the adapters and the unpruned merge"
    )
    metrics: tuple[str, ...] | None = Field(
        default=None,
        description="scores to compute: exact_match, token_f1, bleu, chrf, rouge1, rouge2, rougeL, "
        "rougeLsum, bertscore_f1, loss, perplexity; default: the task's own, without bertscore_f1",
    )
    metric_rules: Literal["squad", "mlqa", "mlqa-fixed", "unicode"] | None = Field(
        default=None,
        description="how answers are normalised: squad, the English SQuAD rules for all languages; "
        "mlqa, the MLQA rules of each language; mlqa-fixed, with a corrected rule for the Arabic "
        "article; or unicode, words of any script, where scripts without spaces are split by "
        "character; default: by language, unicode for those without spaces between words (bo, dz, "
        "ja, km, lo, my, th, yue, zh), squad for all others",
    )
    rouge: Literal["unicode", "xlsum"] = Field(
        default="unicode",
        description="how ROUGE finds words: unicode, any script without stemming; or xlsum, as the "
        "authors of XL-Sum do",
    )
    bertscore_model: str | None = Field(
        default=None, description="encoder for bertscore_f1: folder or hub id; default: by language"
    )
    resamples: Annotated[int, Field(ge=100)] = Field(
        default=1000, description="bootstrap resamples for each interval"
    )
    limit: PositiveInt | None = Field(
        default=None, description="score only the first N examples of each test set"
    )
