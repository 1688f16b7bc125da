"""What `benchmarks.recipes` recorded, as rows, tables, goals and pictures."""

from pathlib import Path

from benchmarks import records

AUTO = "auto"
"""The name of `recipe: auto` among recipes."""
FOLDER = records.FOLDER / "recipes"
NEW_PAIRS = ("en-hi", "en-vi", "en-ha")
"""Pairs that no run was made of while the chooser was made."""


def collection_of(adapters_seed: int) -> str:
    """Return the collection of what begins from adapters of a seed."""
    return f"adapters-{adapters_seed}"


def write(folder: Path, main: Path, out: Path) -> None:
    """Write recipes.json, the tables of recipes.md and its pictures."""
    raise NotImplementedError
