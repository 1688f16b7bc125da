"""Settings made from command-line options alone, for evaluating what no configuration describes."""

from collections.abc import Sequence

from grasp_lora.adapters.opening import is_adapter, named_base_model
from grasp_lora.config.run_config import RunConfig, make_config


def evaluation_config(
    adapter: str,
    task: str,
    data: Sequence[str],
    languages: Sequence[str],
    model: str | None = None,
    prompt: str | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Return settings for evaluating any adapter or model on files of labelled rows.

    Args:
        adapter: a PEFT adapter folder, or a model.
        task: name of the task.
        data: files; "NAME=FILE" names a test set, one may go without.
        languages: language code of all the files, or of each.
        model: base model; None takes the one the adapter names.
        prompt: template in place of the languages' own.
        overrides: further settings as `key=value`.

    Raises:
        ValueError: the languages do not fit the files, two sets have one name, or there is no
            base model.
    """
    if adapter == "none" and model is None:
        raise ValueError("none stands for the bare model of --config or --model; give one of them")
    if model is not None and adapter not in ("none", model) and not is_adapter(adapter):
        raise ValueError(
            f"{adapter} is a model and no adapter, so it has no base model, but --model gives "
            f"{model}; leave --model out"
        )
    named = [_named(text) for text in data]
    names = [name for name, _ in named]
    twice = [name or "(no name)" for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(
            f"two files of --data are called {twice[0]}; give each a name of its own: NAME=FILE"
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


def _named(text: str) -> tuple[str, str]:
    """Return (name, file) of "NAME=FILE", a name of "" where there is none."""
    name, equals, path = text.partition("=")
    # A path may hold the sign as well; a name holds no separator.
    return (name, path) if equals and "/" not in name else ("", text)
