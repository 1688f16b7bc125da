"""A baseline: Optuna chooses ratios from the best dev losses of full fine-tuning runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Stage

LOWEST = 0.1


def next_ratio(stage: Stage, earlier: Sequence[Mapping[str, Any]]) -> float:
    """Return the ratio of an Optuna trial, in [0.1, `controller.high`].

    Args:
        stage: the trial. Its option `sampler` names Optuna's sampler. Its option `drawn` is the
            number of first trials whose ratios are drawn at random; Optuna's default is ten.
        earlier: facts of the earlier trials, in their order. They are replayed in a new study with
            the same seed, which then asks for the same ratios again.

    Raises:
        NotApplicable: Optuna, or a package that its sampler needs, is not installed.
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
