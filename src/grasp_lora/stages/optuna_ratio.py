"""Optuna chooses the next ratio from full fine-tuning runs, each judged by its best dev loss."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Stage

LOWEST = 0.1


def next_ratio(stage: Stage, earlier: Sequence[Mapping[str, Any]]) -> float:
    """Return the ratio of a trial.

    Args:
        stage: the trial; options `sampler`, and `drawn`, how many trials are at ratios drawn at
            random before the sampler has a model. Optuna's samplers would draw ten.
        earlier: facts of the trials before it, in their order. A new study with the same seed is
            told them, and asks for the same ratios again.

    Raises:
        NotApplicable: Optuna, or what its sampler needs, is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise NotApplicable("Optuna is not installed; run: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    samplers = {
        "tpe": optuna.samplers.TPESampler,
        "gp": optuna.samplers.GPSampler,
        "random": optuna.samplers.RandomSampler,
    }
    kind, drawn = stage.options["sampler"], stage.option("drawn")
    own = {} if drawn is None else {"n_startup_trials": drawn}
    try:
        study = optuna.create_study(sampler=samplers[kind](seed=stage.config.seed, **own))
        for facts in earlier:
            trial = study.ask()
            trial.suggest_float("ratio", LOWEST, stage.config.controller.high)
            loss = facts["best"]["loss"]
            study.tell(trial, loss if loss is not None and math.isfinite(loss) else None)
        return study.ask().suggest_float("ratio", LOWEST, stage.config.controller.high)
    except ImportError as error:
        raise NotApplicable(f"Optuna's {kind} sampler: {error}") from None
