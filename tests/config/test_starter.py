"""A first configuration is short, is what was asked for, and loads."""

import itertools

import pytest
import yaml

from grasp_lora.config.run_config import load_config
from grasp_lora.config.starter import SCHEMA_FILE, Start, starter_yaml
from hostile import HOSTILE


@pytest.mark.parametrize(
    ("source", "target", "source_data"),
    list(itertools.product((None, "s"), (None, "t"), (None, "en.jsonl"))),
)
def test_a_first_configuration_has_fewer_than_25_lines_and_names_its_schema(
    source, target, source_data
):
    start = Start("m", "qa", "ar", "ar.jsonl", source, target, "en", source_data)
    text = starter_yaml(start)
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={SCHEMA_FILE}"
    assert len(text.splitlines()) < 25
    found = yaml.safe_load(text)
    given = {"source": source, "target": target}
    named = {role: place for role, place in given.items() if place is not None}
    assert found.get("adapters", {}) == named
    assert found["data"]["target"] == {"language": "ar", "files": "ar.jsonl"}
    expected = None if source_data is None else {"language": "en", "files": source_data}
    assert found["data"].get("source") == expected


def test_the_commented_prompt_is_the_one_in_force_and_may_be_uncommented():
    prompt = 'Say "yes".\nText: {context}\nQuestion: {question}'
    text = starter_yaml(Start("m", "qa", "ar", "ar.jsonl", "s", "t", prompt=prompt))
    assert "prompt" not in yaml.safe_load(text)["data"]["target"]
    found = yaml.safe_load(text.replace("# prompt:", "prompt:"))
    assert found["data"]["target"]["prompt"] == prompt
    assert len(text.splitlines()) < 25


@pytest.mark.parametrize("name", [*HOSTILE, "1e3", "no", "# x", "a: b", "~", "C:\\new", "null"])
def test_any_name_stays_the_text_it_is(name):
    found = yaml.safe_load(starter_yaml(Start(name, "qa", "no", name, name, name)))
    assert found["model"] == found["adapters"]["source"] == found["data"]["target"]["files"] == name
    assert found["data"]["target"]["language"] == "no"


def test_a_first_configuration_loads(tmp_path):
    (tmp_path / "ar.jsonl").touch()
    for name in "st":
        (tmp_path / name).mkdir()
    file = tmp_path / "first.yaml"
    start = Start(
        "smollm2", "qa", "ar", str(tmp_path / "ar.jsonl"), *(str(tmp_path / n) for n in "st")
    )
    file.write_text(starter_yaml(start), encoding="utf-8")
    config = load_config(file, [], training=False)
    assert config.budget == 5
    assert config.data.target.language == "ar"
