"""Recipes are frozen values; what excludes each other is refused."""

import pytest

from grasp_lora.core.recipes.recipe import STARTS, Recipe


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"start": "avarage"}, "no start 'avarage'; choose from backbone, source"),
        ({"start": "backbone"}, "no adapter to train; set step to None"),
        ({"start": "source", "step": None, "shots": 4}, "4 solved examples go with the backbone"),
        ({"start": "average", "merge": "after"}, "needs the source adapter fine-tuned"),
        ({"start": "source", "step": None, "merge": "after"}, "needs the source adapter"),
        ({"start": "source", "step": 0.0}, "step 0.0 is no multiple of a step size"),
        ({"start": "source", "step": float("nan")}, "step nan is no multiple"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(values, says):
    with pytest.raises(ValueError, match=says):
        Recipe(**values)


def test_equal_recipes_are_one_key():
    assert len({Recipe("source"), Recipe("source", 1.0), Recipe("source", 3.0)}) == 2
    two = (Recipe("source"), Recipe("average"))
    assert Recipe(two, None) == Recipe(two, step=None)


def test_every_start_that_is_a_merge_says_how():
    given = {"backbone", "source", "target", "fresh", "merged"}
    assert {name for name, start in STARTS.items() if start.merge is None} == given
