"""The two ratios that an n:m structure knows."""

import pytest

from grasp_lora.core.pruning.n_of_m import known_ratio


@pytest.mark.parametrize(
    ("structure", "asked", "known"),
    [
        ("entries", 0.37, 0.37),
        ("rank", 0.37, 0.37),
        ("2:4", 0.0, 0.0),
        ("2:4", 0.249, 0.0),
        ("2:4", 0.25, 0.5),
        ("2:4", 0.5, 0.5),
        ("4:8", 0.95, 0.5),
    ],
)
def test_a_ratio_stands_for_the_nearer_one_that_is_known(structure, asked, known):
    assert known_ratio(structure, asked) == known
