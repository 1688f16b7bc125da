"""The list of settings is complete and true."""

from pathlib import Path

from grasp_lora.config.reference import all_settings, settings_markdown
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


def test_there_are_at_most_ninety_four_settings():
    assert len(all_settings()) <= 94


def test_the_document_holds_the_settings_of_this_version():
    assert settings_markdown() in DOCUMENT.read_text(encoding="utf-8")
