"""The laboratory of profiles: what its worlds are, and what the policy finds in them."""

import itertools
import json

import numpy as np
import pytest
from benchmarks import profiles
from benchmarks.profiles import FAMILIES, GROUPS, HIGH, WAYS, WEIGHTS, ProfileWorld, ratios_of
from benchmarks.worlds import POOL

from grasp_lora.core.pruning.profile import Profile


@pytest.mark.parametrize("family", FAMILIES)
def test_a_world_sees_its_own_losses(family):
    world = ProfileWorld(family, 3)
    best = dict(zip(GROUPS, world.best, strict=True))
    assert world.regret(best) == 0.0
    levels = [world.regret(ratios_of(Profile(level))) for level in np.linspace(0, HIGH, 161)]
    assert max(levels) - min(levels) == pytest.approx(0.0 if family == "flat" else 1.0)
    worse = [world.losses(ratios_of(Profile(HIGH)), range(POOL)) for _ in range(2)]
    better = world.losses(best, range(POOL))
    seen = np.mean(worse[0]) - np.mean(better)
    assert seen == pytest.approx(levels[-1], abs=0.5)
    assert np.corrcoef(worse)[0, 1] > 0.9, "rows agree with themselves"


def test_the_spread_of_rows_is_that_of_the_other_laboratory():
    worlds = [ProfileWorld("flat", seed) for seed in range(30)]
    ratios = ratios_of(Profile(0.5))
    seen = [np.std(np.subtract(w.losses(ratios, range(POOL)), 2 + w._hardness)) for w in worlds]
    expected = 0.1 * float(np.interp(0.5, profiles.RATIOS, profiles.SPREAD))
    assert np.mean(seen) == pytest.approx(expected, rel=0.1)


def test_the_floor_of_one_ratio_is_the_variance_of_the_best_ratios():
    one, profile = profiles.floors("module", [4])
    world = ProfileWorld("module", 4)
    mean = WEIGHTS @ world.best
    assert one == pytest.approx(world._height * WEIGHTS @ (world.best - mean) ** 2, abs=1e-3)
    assert profile < 0.05 * one


@pytest.mark.parametrize("name", [name for name in WAYS if name != "TPE"])
def test_every_way_is_the_same_again(name):
    found = WAYS[name]("all three", 3, 24)
    profiles.searched.cache_clear()
    assert WAYS[name]("all three", 3, 24) == found
    assert all(0 <= ratio <= HIGH for ratio in found.ratios.values())
    assert found.forwards >= 24 * 12


def test_the_policy_finds_a_strong_profile_in_the_same_probes():
    drawn = ((seed, ProfileWorld("adapter", seed)) for seed in range(9000, 9100))
    strong = ((seed, world) for seed, world in drawn if np.ptp(world.best) > 0.5)
    seeds, worlds = zip(*itertools.islice(strong, 6), strict=True)
    found = [WAYS["policy"]("adapter", seed, 24) for seed in seeds]
    plain = [WAYS["one ratio"]("adapter", seed, 24) for seed in seeds]
    assert {one.forwards for one in found} == {one.forwards for one in plain} == {288}
    assert sum(one.differ for one in found) >= 4
    regret, other = (
        np.mean([w.regret(one.ratios) for w, one in zip(worlds, each, strict=True)])
        for each in (found, plain)
    )
    assert regret < 0.5 * other


def test_the_policy_stays_with_one_ratio_where_groups_are_alike():
    wrong = profiles.taken_wrongly(range(9000, 9020))
    # at a rate of 5 % more than 3 of 20 has a chance of 1.6 %
    assert wrong["searches"] == 20
    assert max(wrong["flat"], wrong["even"]) <= 3 / 20


def test_the_laboratory_of_profiles_writes_its_figures(tmp_path, capsys):
    out = tmp_path / "profiles.json"
    profiles.main(["--quick", "--only", "policy", "by adapter", "--json", str(out)])
    figures = json.loads(out.read_text())
    assert list(figures["ways"]) == ["policy", "by adapter"]
    found = figures["ways"]["policy"]["24"]
    assert found["forwards"] == 288
    assert set(found["taken"]) == set(FAMILIES)
    judged = [value for family, value in found["regret"].items() if family != "mean"]
    assert found["regret"]["mean"] == pytest.approx(np.mean(judged))
    printed = capsys.readouterr().out
    assert (
        "| way | forwards | even | depth | module | adapter | all three | interaction |" in printed
    )
    assert "`policy` takes tilts in 2 searches each" in printed
