"""Every setting with its default and its meaning, read off the settings classes themselves."""

import ast
import dataclasses
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from grasp_lora.config.data_sections import LanguageData
from grasp_lora.config.run_config import RunConfig
from grasp_lora.config.sections import ModelSettings
from grasp_lora.core import ControllerConfig
from grasp_lora.core.controller.settings import Preset

# Sections that a run must give have no default to walk into.
_REQUIRED_SECTIONS: dict[str, type[BaseModel]] = {
    "model": ModelSettings,
    "data.source": LanguageData,
    "data.target": LanguageData,
}


@dataclass(frozen=True)
class Setting:
    """One setting: its dotted key, its default as text, what it does."""

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


def _of_model(model: type[BaseModel], prefix: str) -> Iterator[Setting]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        section = _section(key, field)
        if section is ControllerConfig:
            yield from _of_controller(key)
        elif section is not None:
            yield from _of_model(section, f"{key}.")
        else:
            yield Setting(key, _shown(field), field.description or "")


def _section(key: str, field: FieldInfo) -> Any:
    if key in _REQUIRED_SECTIONS:
        return _REQUIRED_SECTIONS[key]
    kind = field.annotation
    if inspect.isclass(kind) and (issubclass(kind, BaseModel) or kind is ControllerConfig):
        return kind
    return None


def _of_controller(prefix: str) -> Iterator[Setting]:
    meanings = _attribute_docstrings(ControllerConfig)
    presets = {name: ControllerConfig(preset=name) for name in get_args(Preset)}
    for field in dataclasses.fields(ControllerConfig):
        shown = {name: _text(getattr(config, field.name)) for name, config in presets.items()}
        same = len(set(shown.values())) == 1
        default = shown["standard"] if same else f"{shown['standard']} (paper: {shown['paper']})"
        if field.name == "preset":
            default = "standard"
        yield Setting(f"{prefix}.{field.name}", default, meanings[field.name])


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """Return field -> the string that stands under it in the class's source."""
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
    if value is None or value == {} or value == ():
        return "none"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).lower() if isinstance(value, bool) else str(value)
