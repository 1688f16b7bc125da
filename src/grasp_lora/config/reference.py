"""All settings with default and meaning, as a table and as a schema, from the settings classes."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from grasp_lora.config.data_sections import LanguageData
from grasp_lora.config.run_config import RunConfig, paper_settings
from grasp_lora.config.sections import TRAINING_DEFAULTS, ModelSettings, Training
from grasp_lora.core import ControllerConfig

# These sections have no default, so their classes cannot be found through it.
_REQUIRED_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSettings,
    "data.source": LanguageData,
    "data.target": LanguageData,
}


@dataclass(frozen=True)
class Setting:
    """One setting: dotted key, default as text, meaning."""

    key: str
    default: str
    meaning: str


def all_settings() -> list[Setting]:
    """Return every setting of a run in the order of the sections."""
    return list(_of_model(RunConfig, ""))


def settings_markdown() -> str:
    """Return all settings as a Markdown table."""
    lines = ["| setting | default | what it does |", "|---|---|---|"]
    for setting in all_settings():
        cells = (setting.key, setting.default, setting.meaning)
        lines.append("| `{}` | {} | {} |".format(*(c.replace("|", "\\|") for c in cells)))
    return "\n".join(lines) + "\n"


def settings_schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration, by which editors complete and check the YAML.

    It knows names, types, bounds and meanings. What two settings say together, such as splits
    without rows, only `load_config` checks.
    """
    found = RunConfig.model_json_schema()
    name = found["$defs"]["ModelSettings"]["properties"]["name"]
    model = found["properties"]["model"]
    found["properties"]["model"] = {
        "description": model["description"],
        "anyOf": [{"$ref": model["$ref"]}, {"type": "string", "minLength": name["minLength"]}],
    }
    controller = found["$defs"]["ControllerConfig"]["properties"]
    for key, meaning in _attribute_docstrings(ControllerConfig).items():
        if key in controller:
            controller[key]["description"] = meaning
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    return head | _any_of(found) | {"title": "grasp-lora configuration"}


def _any_of(value: Any) -> Any:
    """Return a schema whose alternatives may overlap: `builtin` is a path too, for a schema."""
    if isinstance(value, list):
        return [_any_of(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {"anyOf" if key == "oneOf" else key: _any_of(one) for key, one in value.items()}


def _of_model(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        section = _section(key, field)
        if section is ControllerConfig:
            yield from _of_controller(key)
        elif section is Training:
            yield Setting(key, _overrides(key, name), field.description or "")
        elif section is not None:
            yield from _of_model(section, f"{key}.")
        else:
            yield Setting(key, _with_paper(key, _shown(field)), field.description or "")


def _section(key: str, field: FieldInfo) -> Any:
    if key in _REQUIRED_SECTIONS:
        return _REQUIRED_SECTIONS[key]
    kind = field.annotation
    if inspect.isclass(kind) and (issubclass(kind, BaseModel) or kind is ControllerConfig):
        return kind
    return None


def _overrides(key: str, training: str) -> str:
    """Return the values in which one training differs by default, and where others hold."""
    usual = TRAINING_DEFAULTS["restart"][training]
    others = {
        f"finetune.mode {mode}": _text(trainings[training])
        for mode, trainings in TRAINING_DEFAULTS.items()
        if trainings[training] != usual
    }
    paper = _paper(key)
    others |= {"paper": paper} if paper is not None else {}
    return _text(usual) + _exceptions(others)


def _exceptions(others: Mapping[str, str]) -> str:
    """Return ` (where: value; ...)`, or nothing where there are none."""
    texts = [f"{where}: {text}" for where, text in others.items()]
    return f" ({'; '.join(texts)})" if texts else ""


def _with_paper(key: str, default: str) -> str:
    """Return a default with the published value behind it if that differs."""
    paper = _paper(key)
    return default + _exceptions({} if paper in (None, default) else {"paper": paper})


def _paper(key: str) -> str | None:
    """Return the published value of a setting as text, None where `paper.yaml` has none."""
    value: Any = paper_settings()
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return _text(tuple(value) if isinstance(value, list) else value)


def _of_controller(prefix: str) -> Iterator[Setting]:
    meanings, standard = _attribute_docstrings(ControllerConfig), ControllerConfig()
    for field in dataclasses.fields(ControllerConfig):
        key, default = f"{prefix}.{field.name}", _text(getattr(standard, field.name))
        yield Setting(key, _with_paper(key, default), meanings[field.name])


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """Return field -> the string below it in the source of the class."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(following, ast.Expr):
            continue
        if isinstance(statement.target, ast.Name) and isinstance(following.value, ast.Constant):
            found[statement.target.id] = " ".join(str(following.value.value).split())
    return found


def _shown(field: FieldInfo) -> str:
    if field.default_factory is not None:
        return _text(field.get_default(call_default_factory=True))
    return "required" if field.default is PydanticUndefined else _text(field.default)


def _text(value: Any) -> str:
    """Return a value as a user writes it in YAML; "none" where there is nothing."""
    if value is None or value == {} or value == ():
        return "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    if isinstance(value, tuple):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
