"""Each fault of a configuration is told once, in the words and the keys of the user."""

from pathlib import Path
from typing import Any

import pytest

from grasp_lora.config.reference import all_settings
from grasp_lora.config.run_config import ConfigError, load_config, make_config

HEAD = "model: m\ndata:\n  source: {language: en}\n  target: {language: %s}\n"


def faults(folder: Path, text: str, *options: str) -> list[str]:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path, options)
    return list(caught.value.faults)


def given(**sections: Any) -> dict[str, Any]:
    data = {"source": {"language": "en"}, "target": {"language": "es"}}
    return {"model": "m", "data": data} | sections


def faults_of(values: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        make_config(values)
    return list(caught.value.faults)


@pytest.mark.parametrize(
    ("word", "read"),
    [("no", "false"), ("Off", "false"), ("on", "true"), ("yes", "true"), ("2023", "a number")]
    + [("1.10", "a number"), ("2023-01-01", "a date")],
)
def test_a_language_that_yaml_reads_as_something_else_is_to_be_quoted(tmp_path, word, read):
    key = "data.target.language"
    fault = f'{key}: YAML reads {word} as {read}; quote it: "{word}"'
    assert faults(tmp_path, HEAD % word) == [fault]
    option = f"{key}: YAML reads {word} as {read}; quote it: --set '{key}=\"{word}\"'"
    assert faults(tmp_path, HEAD % "es", f"{key}={word}") == [option]


def test_norwegian_in_quotes_is_a_language(tmp_path):
    (tmp_path / "run.yaml").write_text(HEAD % '"no"')
    assert load_config(tmp_path / "run.yaml").data.target.language == "no"
    config = load_config(tmp_path / "run.yaml", ['data.target.language="nn"'])
    assert config.data.target.language == "nn"


def test_keys_and_list_entries_that_yaml_reads_as_something_else_are_to_be_quoted(tmp_path):
    text = (
        HEAD % "es"
        + "  tests:\n    on: {language: no, files: a.jsonl}\n    2023: {language: en, files: b}\n"
        + "lora: {target_modules: [no, q_proj]}\nadapters: {source: off, yes: x}\non: 1\n"
    )
    assert sorted(faults(tmp_path, text)) == [
        'adapters.source: YAML reads off as false; quote it: "off"',
        'adapters.yes: YAML reads this key as true; quote it: "yes"',
        'data.tests.2023: YAML reads this key as a number; quote it: "2023"',
        'data.tests.on.language: YAML reads no as false; quote it: "no"',
        'data.tests.on: YAML reads this key as true; quote it: "on"',
        'lora.target_modules.0: YAML reads no as false; quote it: "no"',
        'on: YAML reads this key as true; quote it: "on"',
    ]


def test_a_word_within_an_option_is_to_be_quoted(tmp_path):
    (fault,) = faults(tmp_path, HEAD % "es", "lora.target_modules=[no, q_proj]")
    assert fault == (
        'lora.target_modules.0: YAML reads no as false; quote it: "no", and put the whole option '
        "in single quotes"
    )


def test_true_and_false_are_no_numbers(tmp_path):
    text = HEAD % "es" + "seed: off\ntrain: {epochs: on}\nmerge: {weights: [yes, 1]}\n"
    assert faults(tmp_path, text) == [
        "seed: got False (off in YAML); give a whole number",
        "train.epochs: got True (on in YAML); give a whole number",
        "merge.weights.0: got True (yes in YAML); give a number",
    ]
    assert faults_of(given(controller={"rows": True})) == [
        "controller.rows: got True; give a whole number"
    ]


def test_keys_of_python_that_are_no_text_are_refused():
    values = given()
    values["data"]["tests"] = {7: {"language": "en", "files": "a.jsonl"}}
    assert faults_of(values) == ["data.tests.7: the key 7 is no text; give text"]


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"merge": {"weights": [0.5, "x"]}}, "merge.weights.1: got 'x'; give a number"),
        (
            {"merge": {"weights": "x"}},
            "merge.weights: got 'x'; give a list such as [a, b], or auto or unscaled",
        ),
        (
            {"finetune": {"mask_schedule": "never"}},
            "finetune.mask_schedule: got 'never'; give once or every-step, or a whole number",
        ),
        (
            {"finetune": {"mask_schedule": 0}},
            "finetune.mask_schedule: got 0; give once or every-step, or a number above 0",
        ),
        (
            {"lora": {"target_modules": "q_proj"}},
            "lora.target_modules: got 'q_proj'; give a list such as [a, b], or all-linear",
        ),
        (
            {"lora": {"target_modules": []}},
            "lora.target_modules: got []; give a list of at least 1, or all-linear",
        ),
        (
            {"merge": {"kind": "x"}},
            "merge.kind: got 'x'; give cat, linear, svd, layer-swap or ties-delta",
        ),
        ({"evaluate": {"limit": 1.5}}, "evaluate.limit: got 1.5; give a whole number"),
        (
            {"evaluate": {"resamples": 5}},
            "evaluate.resamples: got 5; give a number of at least 100",
        ),
        ({"seed": 2**40}, "seed: got 1099511627776; give a number below 4294967296"),
        ({"evaluate": {"baselines": "x"}}, "evaluate.baselines: got 'x'; give true or false"),
        ({"model": ""}, "model: got ''; give text that is not empty"),
        ({"model": {"name": 5}}, "model.name: got 5; give text"),
        ({"output": ["x"]}, "output: got ['x']; give a path"),
        ({"train": 5}, "train: got 5; give a block of key: value lines"),
        ({"report_to": "x"}, "report_to: got 'x'; give a list such as [a, b]"),
        (
            {"train": {"max_grad_norm": float("inf")}},
            "train.max_grad_norm: got inf; give a finite number",
        ),
    ],
)
def test_what_is_allowed_is_said_in_words_and_once(section, fault):
    assert faults_of(given(**section)) == [fault]


def test_a_test_set_says_what_its_files_may_be():
    values = given()
    values["data"]["tests"] = {"news": {"language": "en", "files": {"train": "a"}}}
    (fault,) = faults_of(values)
    assert fault == (
        "data.tests.news.files: got {'train': 'a'}; give the path of one file, or xlsum, mlqa or "
        "xquad, or {hub: owner/name, splits: {test: NAME}}"
    )


BAD: tuple[Any, ...] = (object(), 5, -1.5, "?", True, ["a", 2], {"k": 1}, [], {}, float("nan"))
OF_THE_SCHEMA = (
    "tag",
    "<one>",
    "<parts>",
    "<hub>",
    "function-",
    "tuple[",
    "list[",
    "literal[",
    "constrained",
    "should",
)
OF_THE_SCHEMA += ("-or-", "nullable", "instance of", "NoneType", "pathlib", "dataclass", "pydantic")


@pytest.mark.parametrize("key", [s.key for s in all_settings()] + ["data.tests", "data.tests.a"])
def test_no_fault_speaks_of_the_schema(key):
    for bad in BAD:
        values = given()
        place = values
        *sections, last = key.split(".")
        if sections[:1] == ["model"]:
            place["model"] = {"name": "m"}
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = bad
        try:
            make_config(values)
        except ConfigError as error:
            said = error.faults
            assert not [f for f in said for word in OF_THE_SCHEMA if word in f]
            assert len({fault.split(":")[0] for fault in said}) == len(said), "each key once"


@pytest.mark.parametrize(
    ("section", "fault"),
    [
        ({"lora": {"dropout": "20%"}}, "lora.dropout: got '20%'; give a number; write 0.2"),
        ({"lora": {"dropout": 20}}, "lora.dropout: got 20; give a number below 1; write 0.2"),
        (
            {"train": {"lr_decay": 85}},
            "train.lr_decay: got 85; give a number of at most 1; write 0.85",
        ),
        ({"controller": {"low": "5 %"}}, "controller.low: got '5 %'; give a number; write 0.05"),
        ({"train": {"epochs": "20%"}}, "train.epochs: got '20%'; give a whole number"),
        ({"train": {"lr_decay": 850}}, "train.lr_decay: got 850; give a number of at most 1"),
    ],
)
def test_a_percentage_is_told_as_a_fraction(section, fault):
    assert faults_of(given(**section)) == [fault]


@pytest.mark.parametrize("key", ["high", "max_step"])
def test_a_percentage_of_the_controller_is_told_as_a_fraction(key):
    (fault,) = faults_of(given(controller={key: 20}))
    assert "20 % as 0.2" in fault


LONG = "z" * 500


@pytest.mark.parametrize(
    "values",
    [
        given(seed=LONG),
        given(model={"name": "m", "dtype": LONG}),
        given(lora={"target_modules": {LONG: LONG}}),
        given(merge={"weights": [1.0] * 500}),
        given(**{LONG: 1}),
        given(adapters={"source": LONG}),
        given(data=given()["data"] | {"target": {"language": LONG}}),
        given(data=given()["data"] | {"tests": {LONG + "/": {"language": "en", "files": "x"}}}),
    ],
)
def test_at_most_80_characters_of_a_value_are_shown(values):
    said = "\n".join(faults_of(values))
    assert "… (500 " in said or "… (501 " in said or " (1 entry)" in said
    assert "z" * 80 not in said
    assert len(said) < 400


def test_an_option_that_cannot_be_read_is_cut(tmp_path):
    for option in (LONG, f"lora.r=[{LONG}"):
        (fault,) = faults(tmp_path, HEAD % "es", option)
        assert "characters)" in fault
        assert "z" * 80 not in fault


@pytest.mark.parametrize("key", ["adapters.source", "output", "model.name", "data.target.files"])
def test_a_path_with_a_control_character_is_shown_escaped(tmp_path, key):
    (fault,) = faults(tmp_path, HEAD % "es", f'{key}="C:\\new\\x1b[31m"')
    assert fault.startswith(rf"{key}: 'C:\new\x1b[31m' holds a control character")
    assert "single quotes, or with / in place of \\" in fault


def test_a_missing_path_that_turns_the_direction_of_text_is_shown_escaped(tmp_path):
    (fault,) = faults(tmp_path, HEAD % "es", "adapters.source='a\u202eb'")
    assert fault.startswith(r"adapters.source: 'a\u202eb' does not exist")


def test_a_key_is_shown_escaped(tmp_path):
    (fault,) = faults(tmp_path, HEAD % "es" + '"a\\e[31m": 1\n')
    assert fault.startswith(r"a\x1b[31m: unknown key; valid here: output, seed")


def test_unknown_keys_of_files_are_told_without_the_schema():
    data = given()["data"] | {"target": {"language": "es", "files": {"trian": "x"}}}
    (fault,) = faults_of(given(data=data))
    assert fault == "data.target.files.trian: unknown key; did you mean data.target.files.train?"
