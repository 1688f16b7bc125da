"""The configuration of a run: YAML text plus `--set key=value` overrides -> `RunConfig`.

All faults of a file are collected and reported together: dotted key, value given, rule, and for
an unknown key the nearest valid one. `preset: paper` puts the values of `paper.yaml` beneath the
user's own.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from grasp_lora.base.files import jsonable
from grasp_lora.base.words import shown, shown_path, without_home
from grasp_lora.config.data_sections import (
    PRESET_TASKS,
    DataSettings,
    ExampleSource,
    HubData,
    LanguageData,
    OneSet,
)
from grasp_lora.config.faults import ConfigError, describe, numbers_from_words
from grasp_lora.config.sections import (
    TRAINING_DEFAULTS,
    AdapterFolders,
    EvaluateSettings,
    FinetuneSettings,
    LocalPath,
    LoraSettings,
    MergeSettings,
    ModelSettings,
    Positive,
    Section,
    Training,
    TrainingName,
    TrainSettings,
)
from grasp_lora.config.yaml_text import DEEPEST, Words, read_yaml, yaml_fault
from grasp_lora.core import ControllerConfig
from grasp_lora.core.controller.settings import LEAST_CANDIDATES
from grasp_lora.core.merge_kinds import BLENDED
from grasp_lora.core.pruning.n_of_m import N_OF_M, known_ratio

__all__ = ["ConfigError", "LanguageData", "RunConfig", "load_config"]


class RunConfig(Section):
    """Everything a run depends on; `load_config` builds it."""

    output: LocalPath = Field(default=Path("runs/run"), description="folder the run is written to")
    seed: int = Field(
        default=42, ge=0, lt=2**32, description="seed of every random draw of the run"
    )
    preset: Literal["standard", "paper"] = Field(
        default="standard",
        description="values put beneath the settings given here: the defaults of this table, or "
        "the published settings (arXiv 2601.06702)",
    )
    recipe: Literal["auto", "grasp"] = Field(
        default="auto",
        description="auto: try ways to one adapter within the budget and ship the best; grasp: "
        "merge, learn the prune ratio, prune and fine-tune, as published",
    )
    budget: Positive = Field(
        default=5.0,
        description="what recipe auto may spend, in tokens of a plain fine-tuning run as "
        "configured; the training on all labels is included",
    )
    prefer: Literal["best", "small", "simple"] = Field(
        default="best",
        description="what recipe auto ships: the lowest loss (best), or what is not worse by one "
        "standard error and has the smallest adapter (small) or the cheapest recipe (simple)",
    )
    budget_mb: Positive | None = Field(
        default=None,
        description="most megabytes (10^6 bytes) of a copy of the result, small/ beside final/, "
        "with fewer ranks and shorter numbers, which probes choose; default: no copy",
    )
    model: ModelSettings = Field(description="the frozen backbone; plain text is its name")
    adapters: AdapterFolders = Field(
        default=AdapterFolders(), description="adapters you have already"
    )
    data: DataSettings = Field(description="task, examples and languages")
    lora: LoraSettings = Field(default=LoraSettings(), description="shape of adapters trained here")
    merge: MergeSettings = Field(default=MergeSettings(), description="how two adapters become one")
    importance: Literal["magnitude", "activation", "taylor", "taylor-smoothed", "obs"] = Field(
        default="activation",
        description="score by which entries are kept or pruned: their size; their part in the "
        "output; (experimental) what the loss changes without them, by the gradient (taylor) or "
        "by smoothed gradients; or the error of the output, which kept entries make up for (obs)",
    )
    mask_unit: Literal["source", "merged"] = Field(
        default="source",
        description="prune the tensors of each source separately, or the merged tensors",
    )
    structure: Literal["entries", "rank", "2:4", "4:8"] = Field(
        default="entries",
        description="what is pruned: single entries; or whole rank components, which makes the "
        "adapter smaller; or (experimental) two of every four, four of every eight entries along "
        'the input (in quotes: "2:4"), where the search decides between that and nothing',
    )
    scope: Literal["global", "module-type", "layer", "adapter", "policy"] = Field(
        default="global",
        description="tensors that share a ratio: all, or (experimental) those of a module type, a "
        "layer or a source adapter, probed after the search; or policy, where the search itself "
        "tries ratios that differ by depth, module and adapter; the ratios differ only if probes "
        "show that this helps",
    )
    controller: ControllerConfig = Field(
        default_factory=ControllerConfig, description="how the prune ratio is searched"
    )
    train: TrainSettings = Field(
        default=TrainSettings(), description="trainings: of the adapters, the search, the result"
    )
    finetune: FinetuneSettings = Field(default=FinetuneSettings(), description="final pruned run")
    evaluate: EvaluateSettings = Field(
        default=EvaluateSettings(), description="scores on the test rows"
    )
    report_to: tuple[str, ...] = Field(
        default=(), description="trackers that transformers reports to"
    )

    @model_validator(mode="before")
    @classmethod
    def _put_preset_beneath(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or data.get("preset") != "paper":
            return data
        return _layered(_paper_beneath(data), data)

    @model_validator(mode="after")
    def _fill_in_trainings(self) -> "RunConfig":
        # The setter goes past the freeze: nobody sees the object before construction ends.
        object.__setattr__(self, "train", self.train.resolved(self.finetune.mode))
        return self

    @field_validator("model", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def protocol(self) -> Literal["official", "paper"]:
        """Which published splits the parts of xlsum, mlqa and xquad are drawn from."""
        return "paper" if self.preset == "paper" else "official"

    def training(self, name: TrainingName) -> Training:
        """Return all values of one training; patience is None for the search."""
        return getattr(self.train, name)

    def with_training(self, name: TrainingName, **changes: Any) -> "RunConfig":
        """Return the same settings but for values of one training."""
        changed = self.training(name).model_copy(update=changes)
        train = self.train.model_copy(update={name: changed})
        return self.model_copy(update={"train": train})

    def faults(self) -> list[str]:
        """Return one message for each rule between sections that this configuration breaks."""
        found: list[str] = []
        if self.data.source is None and self.adapters.source is None:
            found.append(
                "data.source: not given, and there is no adapters.source; "
                "give examples to train a source adapter, or the folder of an adapter"
            )
        found += self.merge.faults()
        if self.merge.kind in BLENDED and self.mask_unit == "source":
            found.append(
                f"mask_unit: 'source' has no meaning for merge.kind {self.merge.kind!r}, which "
                "mixes the sources; set mask_unit: merged"
            )
        if self.scope == "adapter" and self.mask_unit == "merged":
            found.append(
                "scope: 'adapter' needs the sources apart, but mask_unit is 'merged'; set "
                "mask_unit: source, or another scope"
            )
        found += self._few_ratios()
        found += self._no_policy()
        given = self.adapters.folders()
        found += [
            f"adapters.{role}: not given, but adapters.trained_on.{role} is; give the folder of "
            "the adapter that was trained on these rows, or leave them out"
            for role in self.adapters.trained_on.files()
            if given[role] is None
        ]
        for where, section in self._sections().items():
            task = PRESET_TASKS.get(str(section.files))
            if task not in (None, self.data.task):
                found.append(
                    f"{where}.files: the preset {section.files} is for the task {task}, but "
                    f"data.task is {shown(self.data.task)}; set data.task: {task}"
                )
        found += self._shared_files()
        judges = ("dev", "micro_dev") if self.recipe == "grasp" else ()
        found += _part_faults("data.target", self.data.target, ("train", *judges))
        if self.data.source is not None:
            found += _part_faults("data.source", self.data.source, ("train",))
        return found

    def _few_ratios(self) -> list[str]:
        """Return one message for each setting that leaves nothing to choose to an n:m structure."""
        if self.structure not in N_OF_M:
            return []
        low, high = (
            known_ratio(self.structure, one) for one in (self.controller.low, self.controller.high)
        )
        found: list[str] = []
        if low == high:
            found.append(
                f"controller.low, controller.high: structure {self.structure!r} prunes nothing or "
                f"{known_ratio(self.structure, 1.0)}, and from {self.controller.low} to "
                f"{self.controller.high} only {low} is near; widen the range"
            )
        if self.scope != "global":
            found.append(
                f"scope: {self.scope!r} gives groups different ratios, but structure "
                f"{self.structure!r} knows only one beside 0; set scope: global, or another "
                "structure"
            )
        return found

    def _no_policy(self) -> list[str]:
        """Return one message for each setting that leaves `scope: policy` no rounds to learn in."""
        found: list[str] = []
        if self.scope == "policy" and self.controller.preset == "paper":
            found.append(
                "scope: 'policy' is learned by the standard controller, but controller.preset is "
                "paper; set controller.preset: standard, or another scope"
            )
        elif self.scope == "policy" and self.controller.candidates < LEAST_CANDIDATES:
            found.append(
                f"scope: 'policy' compares {LEAST_CANDIDATES} candidates a round, but "
                f"controller.candidates is {self.controller.candidates}; raise it, or set another "
                "scope"
            )
        return found

    def _shared_files(self) -> list[str]:
        """Return one message for each file whose rows would be of two roles.

        One file may hold two languages in other columns, or several splits by name.
        """
        target = self.data.target
        own = {(_place(path), part) for part, path in target.paths().items()}
        found: list[str] = []
        for role in ("source", "extra"):
            section: LanguageData | OneSet | None = getattr(self.data, role)
            if section is None or section.columns != target.columns:
                continue
            found += [
                f"data.{role}.files: {shown_path(path)} is the file of data.target, read the same "
                "way, so its rows would be of both; give each its own file"
                for part, path in section.paths().items()
                if (_place(path), part) in own
            ]
        return found

    def held_faults(self) -> list[str]:
        """Return one message for each part that judges and has no examples."""
        return _part_faults("data.target", self.data.target, ("dev", "micro_dev"))

    def recipe_faults(self) -> list[str]:
        """Return one message for each setting that a whole run with this `recipe` would not use.

        Single stages and comparisons use them whatever the recipe.
        """
        if self.recipe == "auto" and self.preset == "paper":
            return [
                "preset: paper is the published recipe, but recipe is auto; leave recipe out, or "
                "set preset: standard"
            ]
        if self.recipe == "auto":
            return [
                f"recipe: auto chooses {key} itself; leave it out, or set recipe: grasp"
                for key in _CHOSEN
                if _value(self, key) != _value(_default(), key)
            ]
        return [
            f"{key}: recipe: grasp chooses nothing within a budget; leave {key} out, or set "
            "recipe: auto"
            for key in ("budget", "prefer")
            if _value(self, key) != _value(_default(), key)
        ]

    def missing_files(self) -> list[str]:
        """Return one message for each file or folder named here that does not exist."""
        return [
            f"{key}: {shown_path(path)} does not exist; correct the path (relative to the current "
            "folder)"
            for key, path in self.named_paths().items()
            if not path.exists()
        ]

    def named_paths(self) -> dict[str, Path]:
        """Return setting -> path, of the adapters and of the files of examples."""
        given = self.adapters.folders().items()
        named = {f"adapters.{role}": path for role, path in given if path is not None}
        seen = self.adapters.trained_on.files()
        named |= {f"adapters.trained_on.{role}": path for role, path in seen.items()}
        for where, section in self._sections().items():
            for part, path in section.paths().items():
                named[f"{where}.files{'.' if part else ''}{part}"] = path
        return named

    def _sections(self) -> dict[str, LanguageData | OneSet]:
        """Return dotted name -> section, of all sections of examples that are given."""
        data = self.data
        named = {"source": data.source, "target": data.target, "extra": data.extra}
        named |= {f"tests.{name}": section for name, section in data.tests.items()}
        return {f"data.{name}": one for name, one in named.items() if one is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the whole configuration in JSON's types; `RunConfig(**it)` gives it back."""
        return self.model_dump(mode="json")

    def to_record(self) -> dict[str, Any]:
        """Return `to_dict` for files that are passed on: with `~` for the home folder in paths."""
        whole = _without_home(self.model_dump())
        whole["model"]["name"] = without_home(self.model.name)
        return jsonable(whole)

    def changed_from_preset(self) -> list[str]:
        """Return the dotted settings of the method that differ from those of `preset`.

        Adapters, examples, backbone and evaluation belong to no preset.
        """
        given = {"model": self.model, "data": self.data, "preset": self.preset}
        own, plain = (_method_settings(one) for one in (self, RunConfig.model_validate(given)))
        return sorted(key for key, value in own.items() if value != plain[key])

    def config_hash(self) -> str:
        """Return 16 hex digits of a SHA-256 over all settings that can change the results."""
        content = deciding(self.to_dict())
        # Where a training's value was written makes no difference.
        content["train"] = {name: content["train"][name] for name in TRAINING_DEFAULTS["restart"]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def deciding(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a configuration without what changes no result.

    That is the place of the results, the trackers, and which of several devices of a kind is used.

    Args:
        content: what `RunConfig.to_dict` returned.
    """
    found = {key: value for key, value in content.items() if key not in ("output", "report_to")}
    model = found.get("model", {})
    kind = device_kind(str(model["device"])) if "device" in model else None
    return found | ({"model": model | {"device": kind}} if kind else {})


def _without_home(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_home(item) for key, item in value.items()}
    return without_home(value) if isinstance(value, Path) else value


def device_kind(device: str) -> str:
    """Return a device without its number, such as "cuda" for "cuda:1"."""
    return device.partition(":")[0]


_CHOSEN = (
    *("merge.kind", "merge.weights", "merge.rank", "merge.when", "mask_unit", "scope"),
    *("controller", "finetune.mode", "finetune.rows", "finetune.mask_schedule"),
)
"""Settings that a run with `recipe: auto` would not use."""


@functools.cache
def _default() -> RunConfig:
    """Return a configuration in which nothing is given that has a default."""
    return RunConfig.model_validate({"model": "none", "data": {"target": {"language": "en"}}})


def _value(config: RunConfig, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _place(path: Path) -> Path:
    """Return where a path leads, so that two ways to write it are the same."""
    return Path(os.path.realpath(path))


_OF_METHOD = ("lora", "merge", "controller", "finetune")


def _method_settings(config: RunConfig) -> dict[str, Any]:
    """Return dotted setting -> value, JSON-able, of all that a preset decides."""
    content = config.to_dict()
    sections = {name: content[name] for name in _OF_METHOD}
    sections |= {f"train.{name}": content["train"][name] for name in TRAINING_DEFAULTS["restart"]}
    found = {name: content[name] for name in ("importance", "mask_unit", "structure", "scope")}
    for section, values in sections.items():
        found |= {f"{section}.{key}": value for key, value in values.items()}
    return found


def section_of(config: RunConfig, role: str, split: str) -> ExampleSource:
    """Return where the examples of a split come from; a split of role "tests" is a test set."""
    section = config.data.tests[split] if role == "tests" else getattr(config.data, role)
    assert section is not None, "a role without settings has no rows"
    return section


def load_config(
    path: str | Path, overrides: Sequence[str] = (), training: bool = True
) -> RunConfig:
    """Return the configuration in a YAML file, checked.

    Args:
        path: YAML file. Paths inside it are relative to the current folder; `~` is the home folder.
        overrides: `dotted.key=value`, applied in order on top of the file; a value is YAML.
        training: False leaves out the checks that only training needs.

    Raises:
        FileNotFoundError: If there is no such file.
        ConfigError: With every fault found.
    """
    data, words = read_mapping(Path(path))
    return make_config(data, overrides, str(path), training, words)


def read_mapping(path: Path) -> tuple[dict[str, Any], Words]:
    """Return what a YAML file of `key: value` lines holds, and how its values were written.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: it is not YAML, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no configuration file at {shown_path(path)}; give the path of a YAML file"
        )
    try:
        data, words = read_yaml(path.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        raise ConfigError([f"not YAML: {yaml_fault(error)}"], str(path)) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"not UTF-8 ({error}); save the file as UTF-8"], str(path)) from None
    if not isinstance(data, dict):
        raise ConfigError(["the file must hold `key: value` lines at its top level"], str(path))
    return data, words


def make_config(
    data: dict[str, Any],
    overrides: Sequence[str] = (),
    where: str = "configuration",
    training: bool = True,
    words: Words | None = None,
) -> RunConfig:
    """Return the configuration that nested dictionaries describe, checked.

    Args:
        data: sections and settings; overrides are written into it.
        overrides: `dotted.key=value`, applied in order.
        where: name of the configuration in messages.
        training: False leaves out the checks that only training needs.
        words: how values of `data` were written in YAML.

    Raises:
        ConfigError: With every fault found.
    """
    words = words or Words()
    faults = _apply_overrides(data, overrides, words)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(faults + describe(error, RunConfig, data, words), where) from None
    faults += numbers_from_words(data, config.to_dict(), words)
    faults += (config.faults() if training else []) + config.missing_files()
    if faults:
        raise ConfigError(faults, where)
    return config


@functools.cache
def paper_settings() -> dict[str, Any]:
    """Return the published settings as `paper.yaml` has them."""
    text = resources.files("grasp_lora.config").joinpath("paper.yaml").read_text(encoding="utf-8")
    return read_yaml(text)[0]


def _paper_beneath(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the published settings less those that a more general setting of the user replaces.

    A value the user gives for all trainings replaces the published ones of single trainings, a
    schedule of rounds the published one, and another controller preset the whole controller.
    """
    paper = dict(paper_settings())
    train, controller = given.get("train"), given.get("controller")
    if isinstance(train, Mapping):
        paper["train"] = {
            key: {k: v for k, v in value.items() if k not in train}
            if isinstance(value, Mapping)
            else value
            for key, value in paper["train"].items()
        }
    if isinstance(controller, Mapping):
        if controller.get("preset", "paper") != "paper":
            del paper["controller"]
        elif any(controller.get(key) is not None for key in ("rounds", "interval")):
            schedule = {"rounds", "interval"}
            paper["controller"] = {
                key: value for key, value in paper["controller"].items() if key not in schedule
            }
    return paper


def _layered(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Return `above` on top of `below`, mappings merged key by key."""
    merged = dict(below)
    for key, value in above.items():
        low = merged.get(key)
        if isinstance(low, Mapping) and isinstance(value, Mapping):
            value = _layered(low, value)
        merged[key] = value
    return merged


def _apply_overrides(data: dict[str, Any], overrides: Iterable[str], words: Words) -> list[str]:
    """Write `a.b=value` texts into `data`, and how they were written into `words`.

    Returns:
        A fault for each text that cannot be read.
    """
    faults: list[str] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts) or len(parts) > DEEPEST:
            faults.append(f"--set {shown(text)}: not of the form key=value, such as train.epochs=3")
            continue
        try:
            parsed, written = read_yaml(value)
        except yaml.YAMLError as error:
            faults.append(f"--set {shown(text)}: the value is not YAML ({yaml_fault(error)})")
            continue
        words.add_option(tuple(parts), written)
        if parts[0] == "model" and isinstance(data.get("model"), str):
            data["model"] = {"name": data["model"]}
        place = data
        for part in parts[:-1]:
            if not isinstance(place.get(part), dict):
                place[part] = {}
            place = place[part]
        place[parts[-1]] = parsed
    return faults


def _part_faults(key: str, data: LanguageData, needed: Sequence[str]) -> list[str]:
    """Return one message for each needed part that is missing or has no examples."""
    if data.divided_automatically or (isinstance(data.files, str) and not data.rows):
        return []
    if isinstance(data.files, HubData):
        section, given = "files.splits", set(data.files.splits)
    elif isinstance(data.files, Mapping):
        section, given = "files", set(data.files)
    else:
        section, given = "rows", set(data.rows)
    absent = [part for part in needed if part not in given]
    empty = [part for part, count in data.rows.items() if part in needed and count == 0]
    return [f"{key}.{section}.{part}: required, not given" for part in absent] + [
        f"{key}.rows.{part}: 0 rows, but at least 1 is needed" for part in empty
    ]
