"""Presets and the rules of the controller's settings."""

import copy
import dataclasses
import json
import subprocess
import sys

import pytest
from pydantic import TypeAdapter, ValidationError

from grasp_lora.core.controller.settings import ControllerConfig


def test_the_paper_preset_holds_the_published_numbers():
    config = ControllerConfig(preset="paper")
    assert (config.low, config.high, config.start) == (0.10, 0.80, 0.40)
    assert config.sigma == pytest.approx(0.7 / 6)
    assert (config.interval, config.rounds) == (10, None)
    assert (config.candidates, config.rows, config.probe_rows) == (3, 16, "micro-dev")
    assert config.baseline
    assert (config.lr, config.anchor, config.entropy, config.max_step) == (0.05, 0.05, 0.01, 0.10)


def test_the_standard_preset_starts_unpruned_with_eight_rounds():
    config = ControllerConfig()
    assert (config.low, config.high, config.start) == (0.0, 0.8, 0.0)
    assert (config.rounds, config.interval, config.candidates) == (8, None, 3)
    assert config.probe_rows == "micro-dev+dev"
    assert config.rounds * config.candidates * config.rows == 288
    assert not config.baseline


def test_the_label_says_that_a_setting_is_not_the_presets():
    assert ControllerConfig(preset="paper").label == "paper"
    assert ControllerConfig(preset="paper", rows=16, interval=10).label == "paper"
    assert ControllerConfig(preset="paper", rows=12).label == "paper, changed"
    assert ControllerConfig(max_step=0.2).label == "standard, changed"


def test_values_that_follow_from_the_range_follow_a_changed_range():
    assert ControllerConfig(low=0.2).start == 0.2
    assert ControllerConfig(low=0.2).sigma == 0.1
    assert ControllerConfig(preset="paper", low=0.3).sigma == pytest.approx(0.5 / 6)
    assert ControllerConfig(preset="paper", low=0.5).start == 0.5
    assert ControllerConfig(preset="paper", high=0.3).start == 0.3


def test_a_schedule_of_ones_own_replaces_that_of_the_preset():
    assert ControllerConfig(interval=5).rounds is None
    assert ControllerConfig(preset="paper", rounds=4).interval is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "fast"}, "unknown controller preset 'fast'"),
        ({"low": -0.1}, "0 <= low < high < 1, got low=-0.1"),
        ({"low": 0.5, "high": 0.5}, "0 <= low < high < 1"),
        ({"high": 1.0}, "got low=0.0, high=1.0"),
        ({"low": float("nan")}, "0 <= low < high < 1"),
        ({"rounds": 8, "interval": 10}, "exactly one of rounds and interval"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"interval": 0}, "interval must be at least 1, got 0"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"rows": 0}, "rows must be at least 1"),
        ({"lr": 0.0}, "lr must be a finite number above 0"),
        ({"lr": float("inf")}, "lr must be a finite number above 0"),
        ({"anchor": -1.0}, "anchor must be a finite number of at least 0"),
        ({"max_step": 0.0}, r"max_step must lie in \(0, 1\]"),
        ({"when_flat": "best"}, "when_flat must be one of"),
        ({"probe_rows": "train"}, "probe_rows must be one of"),
    ],
)
def test_a_bad_setting_is_refused_with_its_value(settings, message):
    with pytest.raises(ValueError, match=message):
        ControllerConfig(**settings)


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match="max_step") as caught:
        ControllerConfig(rows=0, lr=-1.0, max_step=2.0)
    assert "rows must" in str(caught.value)
    assert "lr must" in str(caught.value)


@pytest.mark.parametrize("other", ["standard", "paper"])
def test_replace_changes_values_and_refuses_another_preset(other):
    config = ControllerConfig(preset="paper" if other == "standard" else "standard", rows=5)
    again = dataclasses.replace(config, rows=7, max_step=0.2)
    assert (again.rows, again.max_step, again.low) == (7, 0.2, config.low)
    assert dataclasses.replace(config, preset=config.preset) == config
    for one in (config, again, copy.copy(config), copy.deepcopy(config)):
        with pytest.raises(ValueError, match=rf"from '{config.preset}' to '{other}'.*build"):
            dataclasses.replace(one, preset=other)
    read = TypeAdapter(ControllerConfig).validate_python({"preset": config.preset})
    with pytest.raises(ValueError, match="cannot change the controller preset"):
        dataclasses.replace(read, preset=other)
    with pytest.raises(ValueError, match="unknown controller preset 'fast'"):
        dataclasses.replace(config, preset="fast")
    assert "filled_for" not in dataclasses.asdict(config)


def test_settings_survive_json_and_a_pydantic_field():
    config = ControllerConfig(preset="paper", rows=12)
    reader = TypeAdapter(ControllerConfig)
    assert reader.validate_python(json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert reader.validate_python({"preset": "paper", "rows": 12}) == config
    with pytest.raises(ValidationError, match="row"):
        reader.validate_python({"row": 12})
    with pytest.raises(ValidationError, match="rows must be at least 1"):
        reader.validate_python({"rows": 0})


def test_reading_settings_loads_no_torch_and_the_core_loads_no_transformers():
    code = (
        "import sys, grasp_lora.core.controller.settings; assert 'torch' not in sys.modules; "
        "import grasp_lora.core as core; [getattr(core, name) for name in core.__all__]; "
        "assert 'torch' in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
