"""Check what stands in `adapter_config.json`: types of values, and regular expressions.

PEFT checks neither. A value of another type is an error somewhere deep inside it, or changes what
the adapter computes, and a regular expression can take longer than anyone waits.
"""

import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from grasp_lora.base.words import shown, shown_path

MATCHING_SECONDS = 10.0
"""Time that all regular expressions of an adapter have to match the names of all modules."""

_Names = Annotated[
    str | list[str] | None, Field(description="a list of names or a regular expression")
]
_Switch = Annotated[bool | None, Field(description="true or false")]
_Word = Annotated[str | None, Field(description="text")]


class _Content(BaseModel):
    """The settings that this library or PEFT's core reads; a type of adapter has more."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    peft_type: _Word = None
    task_type: _Word = None
    base_model_name_or_path: _Word = None
    r: PositiveInt | None = Field(default=None, description="a whole number above 0")
    lora_alpha: float | None = Field(default=None, description="a finite number")
    use_rslora: _Switch = None
    fan_in_fan_out: _Switch = None
    rank_pattern: dict[str, PositiveInt] | None = Field(
        default=None, description="names or regular expressions with a whole number above 0 each"
    )
    alpha_pattern: dict[str, float] | None = Field(
        default=None, description="names or regular expressions with a finite number each"
    )
    target_modules: _Names = None
    exclude_modules: _Names = None
    layers_pattern: _Names = None
    modules_to_save: list[str] | None = Field(default=None, description="a list of names")
    layers_to_transform: int | list[int] | None = Field(
        default=None, description="a whole number or a list of them"
    )


def check_types(content: Mapping[str, Any], file: object) -> None:
    """Check the types of the settings that are read from an adapter's config.

    Args:
        content: content of `adapter_config.json`.
        file: the file, for messages.

    Raises:
        ValueError: a value has another type, or is a number that is not finite.
    """
    try:
        _Content.model_validate(dict(content))
    except (ValidationError, OverflowError) as error:
        first = error.errors()[0]["loc"][0] if isinstance(error, ValidationError) else "lora_alpha"
        raise ValueError(
            f"{shown_path(str(file))}: {first} is {shown(content[str(first)])}, but must be "
            f"{_Content.model_fields[str(first)].description}; correct the file"
        ) from None


# Each as PEFT matches it: `get_pattern_key` and `check_target_module_exists`.
_FORMS: Mapping[str, str] = {
    "rank_pattern": r"(.*\.)?({})$",
    "alpha_pattern": r"(.*\.)?({})$",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "target_modules": r"(?:{})$",
    "exclude_modules": r"(?:{})$",
}
_PLAIN = re.compile(r"[\w.\-]{1,200}")
_MATCH_ALL = """
import json, re, sys
patterns, names = json.load(sys.stdin)
try:
    for pattern in patterns:
        compiled = re.compile(pattern)
        for name in names:
            compiled.match(name)
except Exception as error:
    print(type(error).__name__, error, end="")
"""


def check_patterns(content: Mapping[str, Any], names: Iterable[str], file: object) -> None:
    """Check that the regular expressions of a config match the names of modules in a short time.

    They are matched in a process of its own, the only place where Python can end a match.

    Args:
        content: content of `adapter_config.json`, after `check_types`.
        names: names of the modules that they are to be matched with.
        file: the file, for messages.

    Raises:
        ValueError: one is no regular expression, or matching takes more than `MATCHING_SECONDS`.
    """
    for setting, form in _FORMS.items():
        given = content.get(setting)
        only_text = setting in ("target_modules", "exclude_modules")
        listed = [given] if isinstance(given, str) else [] if only_text else list(given or ())
        patterns = tuple(form.format(one) for one in listed if not _PLAIN.fullmatch(one))
        if not patterns:
            continue
        why = _fault_of(patterns, tuple(names))
        if why:
            raise ValueError(
                f"{shown_path(str(file))}: {setting} {shown(given)} {why}; write the names of the "
                "modules in its place"
            )


@functools.lru_cache(maxsize=64)
def _fault_of(patterns: tuple[str, ...], names: tuple[str, ...]) -> str:
    """Return what is wrong with regular expressions; "" if nothing is."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH_ALL],
            input=json.dumps([patterns, names]),
            capture_output=True,
            text=True,
            timeout=MATCHING_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"takes more than {MATCHING_SECONDS:g} s to match the names of the modules"
    if done.returncode != 0:
        return "cannot be matched with the names of the modules"
    return f"is no regular expression ({shown(done.stdout)})" if done.stdout else ""
