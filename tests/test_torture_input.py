"""A short form of the odd configurations, data files and adapters."""

import pytest
from benchmarks.torture_input import CASES, fault_of, inputs


@pytest.fixture(scope="module")
def given():
    with inputs() as made:
        yield made


@pytest.mark.parametrize("kind", CASES)
def test_odd_input_is_used_or_refused_in_one_error(given, kind):
    faults = {number: fault_of(given, kind, number, seed=1) for number in range(25)}
    assert {number: fault for number, fault in faults.items() if fault} == {}
