"""Predicts time, memory and money of a plan on GPUs that need not be here."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from grasp_lora.base.words import shown
from grasp_lora.config.run_config import RunConfig
from grasp_lora.config.sections import TrainingName
from grasp_lora.core.forecast.machines import GPUS, SHAPES, Machine, Shape
from grasp_lora.core.forecast.times import (
    ALL,
    BFLOAT16,
    FLOAT32,
    FOUR_BITS,
    Setting,
    answer_seconds,
    fits,
    held_bytes,
    load_seconds,
    makespan,
    read_seconds,
    step_seconds,
)
from grasp_lora.models.backbones import load_model_config
from grasp_lora.plans.show import Planned
from grasp_lora.workbench.context import max_length, model_spec, new_tokens

_ENTRIES: Mapping[str, float] = {"none": BFLOAT16, "8bit": 1.0, "4bit": FOUR_BITS}


@dataclass(frozen=True)
class Place:
    """Where a plan is to be done.

    Attributes:
        gpu: name of a GPU, a key of `GPUS`.
        machine: the GPU, at the price that was given.
        gpus: how many there are.
        size: name of the backbone's size, or of the configured backbone.
        shape: its size.
    """

    gpu: str
    machine: Machine
    gpus: int
    size: str
    shape: Shape


@dataclass(frozen=True)
class StageForecast:
    """What a stage is predicted to take.

    Attributes:
        name: name of the stage.
        alone: seconds on one GPU; None if it does not fit.
        shared: seconds on all GPUs; None if it does not fit.
        memory: bytes on each of all GPUs.
        dollars: of all GPUs.
    """

    name: str
    alone: float | None
    shared: float | None
    memory: float
    dollars: float | None


@dataclass(frozen=True)
class Forecast:
    """What the stages that are not done are predicted to take.

    Attributes:
        place: where.
        stages: each of them.
        loading: seconds in which a process begins.
        one_by_one: seconds, each stage on all GPUs in one launch; None if one does not fit.
        side_by_side: seconds, each stage a process on one GPU; None if one does not fit.
    """

    place: Place
    stages: tuple[StageForecast, ...]
    loading: float
    one_by_one: float | None
    side_by_side: float | None

    def dollars(self, seconds: float) -> float:
        """Return the price of all GPUs for so long."""
        return seconds / 3600 * self.place.gpus * self.place.machine.price


def place_of(
    config: RunConfig, gpu: str, gpus: int, size: str | None, price: float | None
) -> Place:
    """Return where a plan is to be done.

    Args:
        config: settings; they name the backbone unless a size is given.
        gpu: name of a GPU.
        gpus: how many there are, 1 or more.
        size: name of a size, such as "8B"; None takes the configured backbone.
        price: dollars an hour for one GPU; None takes the one of the table.

    Raises:
        ValueError: a name or a number is unknown or out of range, or the backbone's configuration
            does not tell its size.
        FileNotFoundError: the backbone's folder is missing.
    """
    if gpu not in GPUS:
        raise ValueError(f"--gpu: there is no GPU {shown(gpu)} here; choose from {', '.join(GPUS)}")
    if gpus < 1:
        raise ValueError(f"--gpus must be 1 or more, got {gpus}")
    if price is not None and not (math.isfinite(price) and price >= 0):
        raise ValueError(f"--price must be dollars an hour, 0 or more, got {price}")
    if size is not None and size not in SHAPES:
        known = ", ".join(SHAPES)
        raise ValueError(f"--model-size: there is no {shown(size)} here; choose from {known}")
    spec = model_spec(config)
    shape = SHAPES[size] if size is not None else shape_of(load_model_config(spec))
    machine = GPUS[gpu]
    machine = machine if price is None else replace(machine, price=price)
    return Place(gpu, machine, gpus, size or spec.name, shape)


def shape_of(config: Any) -> Shape:
    """Return the size of a backbone from its configuration.

    Raises:
        ValueError: it does not tell it as Llama's configuration does, or it is an encoder-decoder.
    """
    if config.is_encoder_decoder:
        raise ValueError(
            f"the time of an encoder-decoder ({config.model_type}) is not predicted: the kernels "
            "that are counted are those of causal language models; leave --gpu out"
        )
    text = config.get_text_config()
    try:
        return Shape(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            inner=text.intermediate_size,
            heads=text.num_attention_heads,
            key_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
            head=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            vocabulary=text.vocab_size,
            tied=bool(text.tie_word_embeddings),
        )
    except AttributeError as error:
        raise ValueError(
            f"the size of this backbone is not told as Llama's is ({error}); give --model-size, "
            f"one of {', '.join(SHAPES)}"
        ) from None


def forecast(stages: Sequence[Planned], config: RunConfig, place: Place) -> Forecast:
    """Return what the stages that are not done are predicted to take.

    Args:
        stages: the planned stages.
        config: settings of the run.
        place: where they are to be done.
    """
    waiting = [one for one in stages if one.state != "done"]
    found = tuple(_stage(one, config, place) for one in waiting)
    loading = load_seconds(setting_of(config, place, "merge"))
    needs: dict[str, tuple[float, Sequence[str]]] = {}
    whole = loading
    for one, taken in zip(waiting, found, strict=True):
        whole += math.inf if taken.shared is None else taken.shared
        alone = math.inf if taken.alone is None else taken.alone
        needs[one.name] = (loading + alone, one.needs)
    beside = makespan(needs, place.gpus)
    return Forecast(place, found, loading, _finite(whole), _finite(beside))


def _finite(seconds: float) -> float | None:
    return seconds if math.isfinite(seconds) else None


def setting_of(config: RunConfig, place: Place, kind: str) -> Setting:
    """Return how a kind of stage uses the backbone; a merge has the rank of both adapters."""
    named = config.lora.target_modules
    ends = ALL if named == "all-linear" else [name.rsplit(".", 1)[-1] for name in named]
    targets = tuple(name for name in ALL if name in ends) or ALL
    size = FLOAT32 if config.model.dtype == "float32" else BFLOAT16
    entry = size if config.model.quantization == "none" else _ENTRIES[config.model.quantization]
    return Setting(
        place.shape,
        place.machine,
        rank=config.lora.r * (1 if kind == "train" else 2),
        targets=targets,
        entry=entry,
        activation=size,
        checkpointing=config.model.gradient_checkpointing,
    )


def _stage(one: Planned, config: RunConfig, place: Place) -> StageForecast:
    training = config.training(_training_of(one))
    setting = replace(setting_of(config, place, one.kind), together=training.batch_size)
    rows, length = _rows_of(one, config)
    alone, shared = (
        _seconds(one, config, setting, ranks) if fits(setting, rows, length, ranks) else None
        for ranks in (1, place.gpus)
    )
    dollars = None if shared is None else shared / 3600 * place.gpus * place.machine.price
    held = held_bytes(setting, rows, length, place.gpus)
    return StageForecast(one.name, alone, shared, held, dollars)


def _training_of(one: Planned) -> TrainingName:
    if one.kind in ("search", "prune"):
        return "search" if one.kind == "search" else "finetune"
    return "source" if "source" in one.name else "target"


def _rows_of(one: Planned, config: RunConfig) -> tuple[int, float]:
    """Return the examples of a step, and the tokens of each; at least those of one example."""
    training = config.training(_training_of(one))
    rows = training.batch_size * training.accumulation
    if not one.cost.steps:
        return 1, float(max_length(config))
    return rows, one.cost.trained / one.cost.steps / rows


def _seconds(one: Planned, config: RunConfig, setting: Setting, ranks: int) -> float:
    """Return the seconds of a stage: its steps, what it reads, and what it answers."""
    cost, seconds = one.cost, 0.0
    if cost.steps:
        rows, length = _rows_of(one, config)
        seconds += cost.steps * step_seconds(setting, rows, length, ranks=ranks)
    read = cost.forwards + cost.answers
    if not read:
        return seconds
    length, batch = (cost.tokens - cost.trained) / read, config.evaluate.batch_size
    if cost.forwards:
        batches = math.ceil(math.ceil(cost.forwards / batch) / ranks)
        seconds += batches * read_seconds(setting, min(batch, cost.forwards), length)
    if cost.answers:
        most = new_tokens(config, "target", "test")
        batches = math.ceil(math.ceil(cost.answers / batch) / ranks)
        answered = answer_seconds(setting, min(batch, cost.answers), length, most)
        seconds += batches * answered
    return seconds
