"""Error messages for configurations: all faults at once, with the nearest valid keys."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast, get_args, get_origin

from pydantic import BaseModel, ValidationError

from grasp_lora.base.words import printable
from grasp_lora.config.rule_words import (
    dotted,
    key_fault,
    misread_number,
    path_of,
    value_fault,
)
from grasp_lora.config.sections import Training
from grasp_lora.config.yaml_text import KeyPath, Words

_AUTOMATIC = "one labelled file whose rows name no train, dev or micro_dev is divided automatically"
_BY_PRESET = "controller.preset decides it"

OLD_KEYS: Mapping[str, str] = {
    **{
        f"{section}.{key}": f"write train.{section}.{key}"
        for section in ("search", "finetune")
        for key in Training.model_fields
    },
    "search.patience": "a search runs all its epochs",
    "finetune.importance": "write importance; search and final run cut their masks by it",
    "controller.commit": "a commit always cuts the mask at the bounded ratio",
    "controller.refresh_importance": "importance is computed anew in every round",
    "controller.start": _BY_PRESET,
    "controller.sigma": _BY_PRESET,
    "model.gguf_file": "append the file to model.name, such as folder/model.gguf",
    "lora.use_rslora": "multiply lora.alpha by sqrt(lora.r), which scales alike",
    "data.protocol": "preset: paper draws the published splits as the published script does",
    "data.source.labels": _AUTOMATIC,
    "data.target.labels": _AUTOMATIC,
    "evaluate.bertscore_layer": "it is the one that bert-score lists for the encoder",
    "evaluate.bertscore_rescale": "scores are not rescaled; grasp-lora score --bertscore-rescale "
    "rescales those of a file",
    "evaluate.bertscore_max_length": "texts are cut where the encoder ends, at 512 tokens at most",
}
"""Key of an earlier version -> what replaces it."""


class ConfigError(ValueError):
    """A configuration cannot be used; the message lists every fault, one a line."""

    def __init__(self, faults: Sequence[str], where: str = "configuration") -> None:
        self.faults = tuple(faults)
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__(
            "\n".join([f"{printable(where)}: {count}", *(f"  {fault}" for fault in faults)])
        )


def describe(
    error: ValidationError, schema: type[BaseModel], given: Any, words: Words | None = None
) -> list[str]:
    """Return one message for each faulty key, in the order of pydantic's report.

    Args:
        error: the error that validation raised.
        schema: the model that was validated against; the nearest keys are taken from it.
        given: the values that were validated.
        words: how they were written in YAML.
    """
    words = words or Words()
    said: dict[KeyPath, str] = {}
    values: dict[KeyPath, list[Mapping[str, Any]]] = {}
    for fault in error.errors(include_url=False):
        kind, value = fault["type"], fault["input"]
        path = path_of(fault["loc"], given, kind == "missing")
        if kind == "missing":
            said[path] = "required, not given"
        elif kind == "invalid_key" or ("[key]" in fault["loc"] and not isinstance(value, str)):
            said[path] = key_fault(path, value, words)
        elif kind in ("extra_forbidden", "unexpected_keyword_argument") or "[key]" in fault["loc"]:
            said |= dict(_unknown(path, value, schema))
        elif kind == "value_error":
            said[path] = str(fault.get("ctx", {}).get("error"))
        else:
            said.setdefault(path, "")  # keeps the place; the text needs all faults of the value
            values.setdefault(path, []).append(cast(Mapping[str, Any], fault))
    for path, faults in values.items():
        # The member of a union that got deeper into the value says more than the others.
        if any(p[: len(path)] == path and p != path for p in said):
            del said[path]
        elif not said[path]:
            said[path] = value_fault(path, faults, words)
    return [f"{dotted(path, words) or 'all'}: {text}" for path, text in said.items()]


def numbers_from_words(given: Any, used: Any, words: Words, path: KeyPath = ()) -> list[str]:
    """Return one message for each number of the settings that was hardly meant as read.

    These are true and false, a leading 0 (`010` is 8) and numbers with colons (`1:30` is 90).

    Args:
        given: the values that were validated.
        used: what they became, in JSON's types.
        words: how they were written in YAML.
        path: where both stand.
    """
    if isinstance(given, bool) and not isinstance(used, bool) and isinstance(used, int | float):
        kind = "int_type" if isinstance(used, int) else "float_type"
        fault = {"type": kind, "input": given}
        return [f"{dotted(path, words)}: {value_fault(path, [fault], words)}"]
    if isinstance(given, int | float) and isinstance(used, int | float):
        why = misread_number(words.values.get(path, ""), given)
        return [f"{dotted(path, words)}: {why}"] if why else []
    pairs: list[tuple[Any, Any, Any]] = []
    if isinstance(given, Mapping) and isinstance(used, Mapping):
        pairs = [(key, one, used[key]) for key, one in given.items() if key in used]
    elif isinstance(given, list | tuple) and isinstance(used, list):
        pairs = [(place, one, used[place]) for place, one in enumerate(given)]
    below = (numbers_from_words(a, b, words, (*path, str(key))) for key, a, b in pairs)
    return [fault for faults in below for fault in faults]


def _unknown(path: KeyPath, value: Any, schema: type[BaseModel]) -> Iterator[tuple[KeyPath, str]]:
    """Yield (path, what to say) of an unknown key; of a removed section one pair for each key."""
    key = ".".join(path)
    if key == "search" and isinstance(value, Mapping):
        for name in map(str, value):
            near = _nearest(f"train.search.{name}", schema)
            advice = OLD_KEYS.get(f"search.{name}")
            yield ("search", name), f"removed; {advice}" if advice else f"unknown key{near}"
    elif key == "search":
        yield path, "removed; write train.search"
    elif key in OLD_KEYS:
        yield path, f"removed; {OLD_KEYS[key]}"
    elif path and "." in path[-1]:
        outer, _, inner = path[-1].partition(".")
        yield path, f"YAML reads this as one key; write {outer}: and, indented below it, {inner}:"
    else:
        yield path, f"unknown key{_nearest(key, schema)}"


def _nearest(key: str, schema: type[BaseModel]) -> str:
    """Return a hint: a similar key of the same section, else the same word in another section."""
    section, _, word = key.rpartition(".")
    keys = list(_all_keys(schema))
    siblings = [k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == section]
    near = difflib.get_close_matches(word, siblings, n=1)
    found = [f"{section}.{near[0]}" if section else near[0]] if near else []
    found = found or [k for k in keys if k.rpartition(".")[2] == word]
    if found:
        return f"; did you mean {' or '.join(found)}?"
    return f"; valid here: {', '.join(siblings)}" if siblings else ""


def _all_keys(kind: Any, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys below a section, dataclass or mapping of parts, sections included."""
    fields: dict[str, Any] = {}
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        fields = {name: field.annotation for name, field in kind.model_fields.items()}
    elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
        fields = {field.name: None for field in dataclasses.fields(kind)}
    elif get_origin(kind) is dict:
        fields = dict.fromkeys(get_args(get_args(kind)[0]))
    elif get_origin(kind) is not None:
        for member in get_args(kind):
            yield from _all_keys(member, prefix)
    for name, annotation in fields.items():
        yield f"{prefix}{name}"
        yield from _all_keys(annotation, f"{prefix}{name}.")
