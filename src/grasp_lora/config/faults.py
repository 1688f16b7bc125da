"""Error messages for configurations: all faults at once, with the nearest valid keys."""

import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from grasp_lora.config.sections import Training

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
        super().__init__("\n".join([f"{where}: {count}", *(f"  {fault}" for fault in faults)]))


def describe(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """Return one message for each faulty key, in the order of pydantic's report.

    Args:
        error: the error that validation raised.
        schema: the model that was validated against; the nearest keys are taken from it.
    """
    given: dict[str, str] = {}
    rules: dict[str, list[str]] = {}
    for fault in error.errors(include_url=False):
        key = _dotted(fault["loc"])
        kind = fault["type"]
        if kind == "missing":
            rules[key] = ["required, not given"]
        elif kind in ("extra_forbidden", "unexpected_keyword_argument") or "[key]" in fault["loc"]:
            rules |= {name: [rule] for name, rule in _unknown(key, fault["input"], schema)}
        elif kind == "value_error":
            rules.setdefault(key, []).append(str(fault.get("ctx", {}).get("error")))
        elif not rules.get(key, [""])[0].startswith(("unknown key", "removed")):
            given[key] = f"got {_short(fault['input'])}; "
            rules.setdefault(key, []).append(_PLAIN.get(kind) or _lowered(fault["msg"]))
    return [
        f"{key or 'all'}: {given.get(key, '')}{' or '.join(dict.fromkeys(found))}"
        for key, found in rules.items()
    ]


_PLAIN = {
    "model_type": "give a block of key: value lines",
    "dataclass_type": "give a block of key: value lines",
    "path_type": "give a path",
    "tuple_type": "give a list such as [a, b]",
}


def _unknown(key: str, value: Any, schema: type[BaseModel]) -> Iterator[tuple[str, str]]:
    """Yield (key, what to say) of an unknown key; of a removed section one pair for each key."""
    if key == "search" and isinstance(value, Mapping):
        for name in map(str, value):
            near = _nearest(f"train.search.{name}", schema)
            advice = OLD_KEYS.get(f"search.{name}")
            yield f"search.{name}", f"removed; {advice}" if advice else f"unknown key{near}"
    elif key == "search":
        yield key, "removed; write train.search"
    elif key in OLD_KEYS:
        yield key, f"removed; {OLD_KEYS[key]}"
    else:
        yield key, f"unknown key{_nearest(key, schema)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lowered(message: str) -> str:
    return message[:1].lower() + message[1:]


def _dotted(loc: Sequence[Any]) -> str:
    """Return the key as written in YAML, without the parts pydantic adds for union members."""
    added = [part for part in loc if str(part).startswith(("<", "[", "literal[", "tuple["))]
    return ".".join(str(p) for p in loc if p not in added and p != "constrained-int")


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
    elif dataclasses.is_dataclass(kind):
        fields = {field.name: None for field in dataclasses.fields(kind)}
    elif get_origin(kind) is dict:
        fields = dict.fromkeys(get_args(get_args(kind)[0]))
    elif get_origin(kind) is not None:
        for member in get_args(kind):
            yield from _all_keys(member, prefix)
    for name, annotation in fields.items():
        yield f"{prefix}{name}"
        yield from _all_keys(annotation, f"{prefix}{name}.")
