"""The list of settings is complete and true."""

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from grasp_lora.config.reference import all_settings, settings_markdown, settings_schema
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core import ControllerConfig

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


def leaves(value, prefix=""):
    for key, inner in value.items():
        overrides = prefix == "train." and isinstance(inner, dict)
        if isinstance(inner, dict) and inner and not key.endswith("rows") and not overrides:
            yield from leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_every_setting_of_a_run_is_listed_with_its_meaning():
    config = RunConfig.model_validate(
        {
            "model": "x",
            "data": {"source": {"language": "en"}, "target": {"language": "es"}},
        }
    )
    listed = {s.key: s for s in all_settings()}
    assert set(leaves(config.to_dict())) == set(listed)
    assert all(s.meaning for s in listed.values())


def test_defaults_are_those_of_the_classes():
    listed = {s.key: s.default for s in all_settings()}
    assert listed["train.epochs"] == "10"
    assert listed["train.source"] == "epochs 3 (paper: epochs 10)"
    assert (
        listed["train.search"] == "none (finetune.mode continue: epochs 5; paper: accumulation 1)"
    )
    assert listed["train.finetune"].startswith("patience 3 (")
    assert listed["lora.target_modules"] == "[q_proj, v_proj]"
    assert listed["controller.low"] == f"0 (paper: {ControllerConfig(preset='paper').low})"
    assert listed["data.target.language"] == "required"


def test_there_are_at_most_ninety_seven_settings():
    assert len(all_settings()) <= 97


def test_the_document_holds_the_settings_of_this_version():
    assert settings_markdown() in DOCUMENT.read_text(encoding="utf-8")


def parts_of(schema: dict[str, Any], part: Any) -> list[dict[str, Any]]:
    """Return the alternatives of a part of a schema, with references followed."""
    if "$ref" in part:
        return parts_of(schema, schema["$defs"][part["$ref"].rpartition("/")[2]])
    return [one for other in part.get("anyOf", []) for one in parts_of(schema, other)] or [part]


def faults(schema: dict[str, Any], part: Any, value: Any, at: str = "") -> Iterator[str]:
    """Yield what a schema finds wrong with a value: its type, unknown keys, missing ones."""
    kinds = {dict: "object", str: "string", bool: "boolean", list: "array", type(None): "null"}
    kind = kinds.get(type(value))
    fitting = [
        one
        for one in parts_of(schema, part)
        if "type" not in one
        or one["type"] == kind
        or (kind is None and one["type"] in ("number", "integer"))
    ]
    if not fitting:
        yield f"{at}: {value!r}"
    elif isinstance(value, dict):
        found = [list(_inner(schema, one, value, at)) for one in fitting]
        yield from min(found, key=len)


def _inner(schema: dict[str, Any], one: Any, value: Any, at: str) -> Iterator[str]:
    yield from (f"{at}{name} is missing" for name in one.get("required", []) if name not in value)
    for name, inner in value.items():
        more = one.get("additionalProperties", True)
        if name in one.get("properties", {}):
            yield from faults(schema, one["properties"][name], inner, f"{at}{name}.")
        elif more is False:
            yield f"{at}{name} is unknown"
        elif isinstance(more, dict):
            yield from faults(schema, more, inner, f"{at}{name}.")


EXAMPLES = [*(Path(__file__).parents[2] / "configs").glob("*.yaml")]
EXAMPLES += [Path(str(resources.files("grasp_lora") / "config" / "demo.yaml"))]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_the_schema_takes_the_configurations_there_are(file):
    schema = settings_schema()
    assert list(faults(schema, schema, yaml.safe_load(file.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budgt": 5}, ["budgt is unknown"]),
        ({"model": 5}, ["model.: 5"]),
        ({"lora": {"r": "many"}}, ["lora.r.: 'many'"]),
        ({"data": {"source": {"language": "en"}}}, ["data.target is missing"]),
    ],
)
def test_the_schema_refuses_what_a_run_refuses(change, said):
    both = {"source": {"language": "en"}, "target": {"language": "es"}}
    schema = settings_schema()
    assert list(faults(schema, schema, {"model": "x", "data": both} | change)) == said


def test_every_setting_has_its_meaning_in_the_schema():
    schema, meanings = settings_schema(), {s.key: s.meaning for s in all_settings()}
    for key, meaning in meanings.items():
        found = [schema]
        for name in key.split("."):
            inner = [one["properties"][name] for one in found if name in one.get("properties", {})]
            found = [one for part in inner for one in (part, *parts_of(schema, part))]
        assert meaning in [one.get("description") for one in found], key
