"""Objectives of a search other than the loss: scores of generated answers."""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any, cast

from torch import nn

from grasp_lora.base.texts import normal_form
from grasp_lora.base.words import shown
from grasp_lora.config.run_config import RunConfig
from grasp_lora.generation.generate import GenerationSettings, generate_texts
from grasp_lora.metrics import METRICS, Row, missing, score
from grasp_lora.scoring.sets import metric_options
from grasp_lora.tasks.encoding import decoder_begin
from grasp_lora.training.search_callback import Objective
from grasp_lora.workbench.context import Context
from grasp_lora.workbench.processes import decided_by_main

LOSS = "loss"
NOT_PER_ROW = ("bleu",)
"""Metrics of a whole set: their values for single examples mean little."""

UserReward = Callable[[list[str], list[tuple[str, ...]]], Sequence[float]]
"""(predictions, the references of each) -> the score of each prediction; higher is better.

All texts are in normal form."""


def say_code(config: RunConfig, say: Callable[[str], None]) -> None:
    """Say that the settings name code of the user's, before it is imported."""
    if ":" in config.controller.reward:
        module = config.controller.reward.partition(":")[0]
        say(f"controller.reward runs the code of the Python module {module} (danger)")


def objective_faults(config: RunConfig) -> list[str]:
    """Return what is wrong with `controller.reward`, before any work is done."""
    name = config.controller.reward
    if name == LOSS:
        return []
    if ":" in name:
        try:
            _function(name)
        except ValueError as error:
            return [str(error)]
        return []
    able = [m for m in METRICS if METRICS[m].higher_is_better and m not in NOT_PER_ROW]
    if name not in able:
        near = get_close_matches(name, able, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {[LOSS, *able]}"
        return [
            f"controller.reward {shown(name)} is neither the loss nor a score of single rows; "
            f"{hint} (or module:function of your own)"
        ]
    options = metric_options(config, config.data.target.language)
    return [f"controller.reward {n}: {why}" for n, why in missing([name], options).items()]


def objective_of(context: Context, splits: Sequence[str]) -> Objective | None:
    """Return the objective that `controller.reward` names; None for the loss.

    The objective takes a model and positions of examples, and returns a value for each example;
    lower is better. For a metric the value is -score / 100, in [-1, 0], so one point is 0.01. For a
    function of the user it is the function's value times -1. A value that is not finite becomes
    NaN.

    Args:
        context: examples and backbone.
        splits: the splits of the target examples that positions count through.

    Raises:
        ValueError: the user's function cannot be loaded.
    """
    config = context.config
    name = config.controller.reward
    if name == LOSS:
        return None
    answered = answers_of(context, splits)
    examples = [e for split in splits for e in context.examples("target", split)]
    language = config.data.target.language
    judge = _function(name) if ":" in name else _metric(context, name, language)

    def cost(model: nn.Module, drawn: Sequence[int]) -> list[float]:
        texts = [normal_form(text) for text in answered(model, drawn)]
        references = [tuple(map(normal_form, examples[i].references)) for i in drawn]
        # All processes must use the same scores, and a user's function may vary between calls.
        scores = decided_by_main(lambda: list(judge(texts, references)))
        if len(scores) != len(texts):
            raise ValueError(
                f"controller.reward {name} gave {len(scores)} scores for {len(texts)} answers; "
                "return one number for each, in their order"
            )
        return [-float(one) if math.isfinite(one) else math.nan for one in scores]

    return cost


def answers_of(
    context: Context, splits: Sequence[str]
) -> Callable[[nn.Module, Sequence[int]], list[str]]:
    """Return a function: (model, positions of examples in the splits) -> the model's answers."""
    config, task, backbone = context.config, context.task, context.backbone
    encoded = [e for split in splits for e in context.encoded("target", split)]
    homes = [split for split in splits for _ in context.encoded("target", split)]
    language = config.data.target.language
    stops = {
        context.end_id("target", split) for split in splits if context.encoded("target", split)
    }

    def answered(model: nn.Module, drawn: Sequence[int]) -> list[str]:
        texts = generate_texts(
            model,
            backbone.tokenizer,
            [encoded[i].input_ids[: encoded[i].prompt_length] for i in drawn],
            GenerationSettings(
                max_new_tokens=config.evaluate.max_new_tokens or task.new_tokens(language),
                min_new_tokens=config.evaluate.min_new_tokens,
                batch_size=config.evaluate.batch_size,
                pad_id=backbone.pad_id,
                stop_ids=sorted({*backbone.stop_ids, *stops}),
                one_line=task.one_line,
                start=decoder_begin(encoded),
            ),
            notice=context.reporter.say,
        )
        return [
            context.prediction("target", homes[i], t) for i, t in zip(drawn, texts, strict=True)
        ]

    return answered


def _metric(context: Context, name: str, language: str) -> UserReward:
    options = metric_options(context.config, language, device=str(context.backbone.device))
    options = replace(options, resamples=0)

    def judge(texts: list[str], references: list[tuple[str, ...]]) -> list[float]:
        rows = [
            Row(str(i), text, given)
            for i, (text, given) in enumerate(zip(texts, references, strict=True))
        ]
        return [one / 100 for one in score(rows, [name], options)[name].per_row]

    return judge


def _function(name: str) -> UserReward:
    """Return the function that `module:function` names.

    Raises:
        ValueError: the module or the function does not exist, or it cannot be called.
    """
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"controller.reward {shown(name)} cannot be loaded ({error}); name a function as "
            "module:function, importable from where the command runs"
        ) from None
    if not callable(found):
        raise ValueError(
            f"controller.reward {shown(name)} is no function; name one that takes "
            "the answers and their references"
        )
    return cast(UserReward, found)
