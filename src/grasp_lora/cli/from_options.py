"""Settings made from command-line options alone, for commands without a configuration."""

import math
from collections.abc import Sequence
from pathlib import Path

from grasp_lora.adapters.opening import is_adapter, named_base_model
from grasp_lora.base.words import shown, shown_path
from grasp_lora.config.run_config import RunConfig, make_config
from grasp_lora.config.sections import at_home
from grasp_lora.workbench.starting import model_of


def evaluation_config(
    adapter: str,
    task: str,
    data: Sequence[str],
    languages: Sequence[str],
    model: str | None = None,
    prompt: str | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Return settings to evaluate any adapter or model on files of labelled examples.

    Args:
        adapter: a PEFT adapter folder, or a model.
        task: name of the task.
        data: files, each as "NAME=FILE" to name the test set; one may have no name.
        languages: one language code for all files, or one for each file.
        model: base model; None takes the base model that the adapter names.
        prompt: prompt template; None takes that of each language.
        overrides: further settings as `key=value`.

    Raises:
        ValueError: the number of languages does not fit the files, two test sets have the same
            name, no base model is known, or a base model is given for a bare model.
    """
    if adapter == "none" and model is None:
        raise ValueError("none stands for the bare model of --config or --model; give one of them")
    if model is not None and adapter not in ("none", model) and not is_adapter(adapter):
        raise ValueError(
            f"{shown_path(adapter)} is a model and no adapter, so it has no base model, but "
            f"--model gives {shown_path(model)}; leave --model out"
        )
    named = [_named(text) for text in data]
    names = [name for name, _ in named]
    twice = [name or "(no name)" for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"two files of --data are called {shown(twice[0])}; give each a name of its own: "
            "NAME=FILE"
        )
    if len(languages) not in (1, len(named)):
        raise ValueError(
            f"{len(languages)} languages for {len(named)} files; give --language once, or once for "
            "every --data, in their order"
        )
    spoken = list(languages) * len(named) if len(languages) == 1 else list(languages)
    rows = {
        name: {"language": language, "files": path, "prompt": prompt}
        for (name, path), language in zip(named, spoken, strict=True)
    }
    main = rows.pop("", {"language": spoken[0], "files": None, "prompt": prompt})
    target = main | {"files": {"test": main["files"]} if main["files"] else {}}
    settings = {
        "model": {"name": model or named_base_model(adapter)},
        "data": {"task": task, "target": target, "tests": rows},
    }
    return make_config(settings, overrides, "command line", training=False)


def merge_config(
    folders: Sequence[Path],
    weights: Sequence[float] | None = None,
    model: str | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Return settings to merge adapter folders; they name no examples.

    Args:
        folders: two or more PEFT adapter folders.
        weights: a weight for each; None leaves it to `merge.weights`.
        model: the backbone; None takes the one that all adapters name.
        overrides: further settings as `key=value`.

    Raises:
        FileNotFoundError: a folder does not exist.
        ValueError: there are fewer than two folders, a folder is no adapter, the weights do not fit
            them, or the adapters name no backbone or different ones.
    """
    if len(folders) < 2:
        raise ValueError(
            f"a merge needs two adapter folders or more, got {len(folders)}; name them all: "
            "grasp-lora merge A B --out C"
        )
    if weights is not None:
        _check_weights(weights, len(folders))
    backbone = model_of(str(folder) for folder in folders) if model is None else at_home(model)
    settings = {"model": {"name": backbone}, "data": {"target": {"language": "en", "files": {}}}}
    config = make_config(settings, overrides, "command line", training=False)
    if weights is not None and config.merge.weights is not None:
        raise ValueError("the weights are given twice; leave --weights or merge.weights out")
    return config


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise ValueError(
            f"--weights gives {len(weights)} numbers for {count} adapters; give one for each, in "
            "their order"
        )
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"--weights {shown(list(weights))}: weights are finite numbers, like 0.5")
    if not any(weights):
        raise ValueError("--weights are all 0, which merges nothing; make one of them non-zero")


def _named(text: str) -> tuple[str, str]:
    """Return (name, file) of "NAME=FILE"; the name is "" if there is none."""
    name, equals, path = text.partition("=")
    # A path may contain "=" as well; a name contains no "/".
    return (name, path) if equals and "/" not in name else ("", text)
