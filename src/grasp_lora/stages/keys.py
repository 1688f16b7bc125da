"""The key of a stage: everything that its result depends on, and nothing else.

A key is a dictionary, so differences can be named setting by setting. Two keys are equal if all
their entries are equal. A setting that one of them lacks counts as its default.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grasp_lora.adapters.chat import TEMPLATE_FILE
from grasp_lora.adapters.folder import adapter_in
from grasp_lora.base.files import STAGE_FILE as STAGE_FILE
from grasp_lora.base.files import jsonable, read_json
from grasp_lora.base.seal import stamp
from grasp_lora.base.words import shortened
from grasp_lora.config.run_config import RunConfig, device_kind
from grasp_lora.stages.stage import Kind, Split, Stage
from grasp_lora.workbench.rows import RunData

Key = dict[str, Any]
_CONTENT = ("*.safetensors", "adapter_config.json", "merge.json", "weights.json", "rank.json")
READ = (*_CONTENT, "ratio.json", TEMPLATE_FILE)
"""Files that stages read from an input folder, as patterns."""


def key_of(
    stage: Stage,
    kind: Kind,
    data: RunData,
    base: str | None,
    inputs: Mapping[str, str],
    template: str | None = None,
) -> Key:
    """Return the key of a stage.

    Args:
        stage: the stage.
        kind: the row of `KINDS` for the stage.
        data: all examples; the key holds a hash of each set that the stage reads.
        base: identifies the weights of the base model (`models.content.base_content`); None where
            only the model's name is known.
        inputs: role -> hash of the folder's content, see `input_content`.
        template: chat template that the prompts get in place of the base model's.
    """
    settings = used_settings(stage, kind)
    settings.pop("model.public_name", None)
    if base is not None:
        settings.pop("model.name", None)
    sets = kind.examples(stage, splits_of(data))
    asked: Key = {}
    if template is not None and settings.get("data.chat"):
        asked["template"] = hashlib.sha256(template.encode()).hexdigest()[:16]
    return asked | {
        "kind": stage.kind,
        "format": kind.format,
        "base": base,
        "settings": settings,
        "options": _given(stage.options),
        "examples": {f"{role}/{split}": data.digest_of(role, split) for role, split in sets},
        "inputs": dict(inputs),
    }


def used_settings(stage: Stage, kind: Kind) -> dict[str, Any]:
    """Return dotted setting -> value, JSON-able, for the settings that the kind of stage uses."""
    values, wanted = flat_settings(stage.config), kind.settings(stage)
    sections = tuple(f"{name}." for name in wanted)
    return {n: value for n, value in values.items() if n in wanted or n.startswith(sections)}


def flat_settings(config: RunConfig) -> dict[str, Any]:
    """Return dotted setting -> value; for each training these are the values it really uses."""
    whole = config.to_dict()
    whole["train"] = {name: config.training(name).model_dump(mode="json") for name in TRAININGS}
    return flat(whole)


TRAININGS = ("source", "target", "search", "finetune")
"""The trainings of a run, as `RunConfig.training` names them."""


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one mapping with dotted names."""
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, Mapping):
            found |= flat(item, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = item
    return found


def hash_of(key: Key) -> str:
    """Return a hash of a key, 16 hex digits; settings at their defaults are left out of it."""
    whole = key | {"settings": _without_defaults(_of_one_kind(key["settings"]))}
    return hashlib.sha256(json.dumps(jsonable(whole), sort_keys=True).encode()).hexdigest()[:16]


def differences(stored: Key, wanted: Key) -> list[str]:
    """Return one line for each entry in which two keys differ: its name, old value and new value.

    Args:
        stored: the key of the existing result.
        wanted: the key of the wanted result. Input folders that do not exist yet may be left out of
            it.
    """
    found: list[str] = []
    if stored.get("kind") != wanted["kind"]:
        return [f"it is the result of a stage {stored.get('kind')}, not {wanted['kind']}"]
    if stored.get("format") != wanted["format"]:
        found.append(
            f"its format is {stored.get('format')}, this version writes {wanted['format']}"
        )
    if stored.get("base") != wanted["base"]:
        found.append("the weights of the base model are others")
    if stored.get("template") != wanted.get("template"):
        found.append("the chat template of the adapters is another")
    old, new = (_of_one_kind(jsonable(one.get("settings", {}))) for one in (stored, wanted))
    defaults = default_settings() if old.keys() != new.keys() else {}
    for name in sorted(old.keys() | new.keys()):
        was, now = (one.get(name, defaults.get(name)) for one in (old, new))
        if was != now:
            found.append(f"{name} was {_shown(was)}, is {_shown(now)}")
    old, new = _given(stored.get("options", {})), _given(wanted["options"])
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            found.append(f"{name} was {_shown(old.get(name))}, is {_shown(new.get(name))}")
    old, new = stored.get("examples", {}), wanted["examples"]
    found += [
        f"the examples of {name} have changed"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    old, new = stored.get("inputs", {}), wanted["inputs"]
    found += [
        f"the folder given as {name} has another content"
        for name in sorted(new)
        if old.get(name) != new[name]
    ]
    return found


@functools.cache
def default_settings() -> dict[str, Any]:
    """Return dotted setting -> default, JSON-able; settings without a default are left out."""
    least = RunConfig.model_validate({"model": "none", "data": {"target": {"language": "en"}}})
    found = jsonable(flat_settings(least))
    return {name: value for name, value in found.items() if name not in ("model.name",)}


def splits_of(data: RunData) -> tuple[Split, ...]:
    """Return all sets of examples in the data."""
    return tuple((role, split) for role, parts in data.parts.items() for split in parts)


def input_content(role: str, folder: Path) -> str:
    """Return a hash of the content that a stage reads from an input folder, 16 hex digits.

    The path does not matter: a run may be moved, and a folder may be written again.

    Args:
        role: the role of the input. For role "ratio" only the ratio of the search counts.
        folder: the input folder.
    """
    kind = role.split()[0]
    if kind == "ratio":
        files = [folder / "ratio.json"]
    else:
        place = adapter_in(folder)
        files = sorted(file for pattern in _CONTENT for file in place.glob(pattern))
        files += [folder / STAGE_FILE] if kind in _FACTS else []
    return _content(kind, tuple((file, *stamp(file)) for file in files))


@functools.lru_cache(maxsize=4096)
def _content(kind: str, stamped: tuple[tuple[Any, ...], ...]) -> str:
    """Return the hash of an input.

    Each file comes with its stamp, so that the cache holds: a process looks at the same folders
    many times, and reads each file only once.
    """
    digest, files = hashlib.sha256(), [file for file, *_ in stamped]
    if kind == "ratio":
        found = read_json(files[0])
        spread = (found.get("spread") or {}).get("ratios")
        digest.update(json.dumps([found.get("ratio"), spread], sort_keys=True).encode())
        return digest.hexdigest()[:16]
    for file in files:
        if file.name == STAGE_FILE:
            marker = read_json(file)
            facts = [marker.get(name) for name in _FACTS[kind]]
            digest.update(json.dumps(facts, sort_keys=True).encode())
            continue
        content = file.read_bytes()
        if file.name == "merge.json":  # the paths in it do not matter
            content = json.dumps(_without_places(json.loads(content)), sort_keys=True).encode()
        digest.update(file.name.encode() + b"\0" + content)
    return digest.hexdigest()[:16]


_FACTS: Mapping[str, tuple[str, ...]] = {
    "judged": ("best",),
    "fold": ("rows",),
    "trial": ("ratio", "best"),
}
"""First word of an input's role -> the facts in its marker that a stage reads."""


def _of_one_kind(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in which a device has no number, since all of a kind compute the same."""
    if "model.device" not in settings:
        return settings
    return settings | {"model.device": device_kind(settings["model.device"])}


def _without_places(merge: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in merge.items() if name != "sources"}


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are given: neither None nor False."""
    return {k: jsonable(v) for k, v in options.items() if v is not None and v is not False}


def _without_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    defaults, values = default_settings(), jsonable(settings)
    return {k: v for k, v in values.items() if k not in defaults or v != defaults[k]}


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value is None else shortened(json.dumps(value, ensure_ascii=False))
