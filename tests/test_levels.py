"""Test the measurement of levels: its draws, its decisions and its table."""

import numpy as np
import pytest
from benchmarks.levels import DECISIONS, SHAPES, Sample, main, measured

from grasp_lora.base.files import read_json


def sample(contexts=2000, rows=5, icc=0.5):
    return Sample(contexts, rows, icc, np.random.default_rng(0))


def test_noise_has_variance_1_and_the_asked_share_of_it_within_a_context():
    noise = sample().noise(2).reshape(2, 2000, 5)
    assert noise.var() == pytest.approx(1, abs=0.05)
    assert np.mean(noise[..., 0] * noise[..., 1]) == pytest.approx(0.5, abs=0.05)
    assert np.mean(noise[0] * noise[1]) == pytest.approx(0, abs=0.05)
    assert sample().groups[4:6] == ["0", "1"]


def test_an_effect_is_three_errors_of_the_mean_that_is_read():
    drawn = Sample(10, 5, 0.5, np.random.default_rng(1))
    error = np.std([drawn.noise(1).mean() for _ in range(4000)])
    assert drawn.effect() == pytest.approx(3 * error, rel=0.05)
    assert drawn.effect(10) == pytest.approx(3 / 10**0.5), "one example of each context"


@pytest.mark.parametrize("name", DECISIONS)
def test_every_decision_is_made_and_is_the_same_again(name):
    found = measured(name, 8, (5, 0.5), 8, 3)
    assert found == measured(name, 8, (5, 0.5), 8, 3)
    assert (found["contexts"], found["rows"], found["icc"]) == (8, 5, 0.5)
    assert found["draws"] == (2 if DECISIONS[name].costly else 8)


def test_a_test_over_contexts_has_its_level_and_one_by_row_has_not():
    found = measured("over-pruned", 10, (5, 0.5), 1000, 4)
    assert 0.03 < found["level"] < 0.07
    assert found["level_by_row"] > 0.13
    assert found["power"] > 0.7


def test_the_table_has_a_row_for_each_shape(tmp_path, capsys):
    asked = ["--quick", "--only", "over-pruned", "--contexts", "4"]
    found = main([*asked, "--json", str(tmp_path / "f")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| decision | rows, icc | 4 contexts |"
    assert len(lines) == 2 + len(SHAPES)
    assert read_json(tmp_path / "f")["decisions"] == found["decisions"]
