"""A sweep: one base configuration, changed for languages and in other ways, with several seeds."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, StringConstraints, ValidationError

from grasp_lora.config.faults import ConfigError, describe
from grasp_lora.config.run_config import RunConfig, make_config, read_mapping
from grasp_lora.config.sections import LocalPath, Section

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=40)]
"""Part of a folder's name."""
Settings = dict[str, Any]
"""Dotted setting -> value, as `--set` takes them."""


def _different(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("each seed once; leave the repeated ones out")
    return seeds


class Variant(Section):
    settings: Settings = Field(default={}, description="settings that differ from the base")
    methods: tuple[str, ...] = Field(
        default=(), description="methods of compare to run, in place of a run by its recipe"
    )


class Sweep(Section):
    """What `load_sweep` reads."""

    base: LocalPath = Field(description="configuration that all runs begin with")
    languages: dict[Name, Settings] = Field(
        min_length=1, description="target language -> its settings, such as data.target.files"
    )
    configurations: dict[Name, Variant] = Field(
        default={"base": Variant()}, min_length=1, description="name -> what differs from the base"
    )
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**32)], ...],
        Field(min_length=1),
        AfterValidator(_different),
    ] = Field(default=(42,), description="of all that follows the adapters")


@dataclass(frozen=True)
class Part:
    """The runs of a sweep in one language with one configuration; they differ by their seed.

    Attributes:
        language: its name in the sweep.
        configuration: its name in the sweep.
        config: the settings, with the base's own seed.
        methods: methods of a comparison; none is a run by the recipe of `config`.
    """

    language: str
    configuration: str
    config: RunConfig
    methods: tuple[str, ...]


def load_sweep(path: Path) -> tuple[Sweep, list[Part]]:
    """Return what a YAML file asks for: the sweep, and its parts, language by language.

    Args:
        path: the file. Paths inside it are relative to the current folder.

    Raises:
        FileNotFoundError: there is no such file, or no file of the base configuration.
        ConfigError: a fault in the file, or in a configuration that it leads to.
    """
    given, words = read_mapping(path)
    try:
        sweep = Sweep.model_validate(given)
    except ValidationError as error:
        raise ConfigError(describe(error, Sweep, given, words), str(path)) from None
    base, base_words = read_mapping(sweep.base)
    parts: list[Part] = []
    for language, own in sweep.languages.items():
        for name, variant in sweep.configurations.items():
            changes = {"data.target.language": language} | own | variant.settings
            config = make_config(
                copy.deepcopy(base),
                [f"{key}={json.dumps(value)}" for key, value in changes.items()],
                f"{path}, {language}, {name}",
                words=copy.deepcopy(base_words),
            )
            parts.append(Part(language, name, config, variant.methods))
    return sweep, parts


def variant_words(variants: Mapping[str, Variant]) -> dict[str, str]:
    """Return configuration -> what it is, in one line."""
    return {
        name: ", ".join(
            [*(f"{key} {json.dumps(value)}" for key, value in one.settings.items())]
            + ([f"methods {', '.join(one.methods)}"] if one.methods else [])
        )
        or "the base"
        for name, one in variants.items()
    }
