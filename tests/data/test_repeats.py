import random

import pytest

from grasp_lora.data.leaks import find_leaks
from grasp_lora.data.repeats import drop_repeated_texts
from grasp_lora.tasks.records import Example, text_key

STORY = "The old bridge over the river was closed on Monday after the flood carried two beams away"


def row(number: str, text: str) -> Example:
    return Example(number, text_key(text), "en", {"article": text}, ("x",))


def test_a_repeated_text_stays_with_the_split_that_measures() -> None:
    near = STORY.replace("Monday", "Friday") + " and nobody was hurt"
    parts = {
        "train": [row("1", STORY), row("2", "Something quite different about a harvest of pears")],
        "test": [row("3", STORY + " and nobody was hurt")],
        "dev": [row("4", near)],
    }
    assert len(find_leaks(parts, threshold=0.5)) == 3
    kept, lost = drop_repeated_texts(parts, threshold=0.5)
    assert {split: [e.id for e in rows] for split, rows in kept.items()} == {
        "train": ["2"],
        "test": ["3"],
        "dev": [],
    }
    assert lost == {"train": 1, "test": 0, "dev": 1}
    assert not find_leaks(kept, threshold=0.5)


@pytest.mark.parametrize("first", ["dev", "micro_dev"])
def test_a_chain_of_repeats_loses_no_more_than_it_must(first: str) -> None:
    """The text between two others is removed, and then the outer two are not similar."""
    words = [f"word{n}" for n in range(60)]
    one, two, three = (" ".join(words[n : n + 40]) for n in (0, 5, 10))
    parts = {"test": [row("1", one)], "train": [row("2", two)], first: [row("3", three)]}
    linked = {(leak.first[1], leak.second[1]) for leak in find_leaks(parts, threshold=0.7)}
    assert linked == {("1", "2"), ("2", "3")}
    kept, lost = drop_repeated_texts(parts, threshold=0.7)
    assert lost == {"test": 0, "train": 1, first: 0}
    assert not find_leaks(kept, threshold=0.7)


def test_all_rows_of_a_repeated_group_leave_together() -> None:
    asked = [
        Example(str(n), "g", "en", {"context": STORY, "question": f"{n}?"}, ("x",))
        for n in range(3)
    ]
    other = Example("t", "h", "en", {"context": STORY.upper(), "question": "?"}, ("x",))
    kept, lost = drop_repeated_texts({"train": asked, "test": [other]})
    assert kept == {"train": (), "test": (other,)}
    assert lost == {"train": 3, "test": 0}


def test_splits_without_repeats_are_left_alone() -> None:
    parts = {"train": (row("1", STORY),), "test": (row("2", "A short one"),)}
    assert drop_repeated_texts(parts) == (parts, {"train": 0, "test": 0})
    assert drop_repeated_texts({"train": (), "test": ()})[1] == {"train": 0, "test": 0}


def by_all_pairs(
    parts: dict[str, list[Example]], threshold: float
) -> dict[str, tuple[Example, ...]]:
    """Drop repeats one pair after the other: equal texts first, then similar ones."""
    units = [(split, e) for split in ("train", "dev", "test") for e in parts[split]]
    gone: set[tuple[str, str]] = set()

    def similarity(one: Example, two: Example) -> float:
        a, b = (
            set(zip(t, t[1:], t[2:], strict=False))
            for t in (one.fields["article"].split(), two.fields["article"].split())
        )
        return len(a & b) / len(a | b)

    for least in (1.0, threshold):
        for at, (split, e) in enumerate(units):
            for other, before in units[:at]:
                both = {(split, e.group), (other, before.group)}
                if other != split and not both & gone and similarity(e, before) >= least:
                    gone.add((other, before.group))
    return {
        split: tuple(e for e in parts[split] if (split, e.group) not in gone) for split in parts
    }


@pytest.mark.parametrize("seed", range(20))
def test_what_is_kept_is_what_comparing_all_pairs_keeps(seed: int) -> None:
    draw = random.Random(seed)
    texts = [[f"word{draw.randrange(200)}" for _ in range(30)] for _ in range(5)]
    rows: list[Example] = []
    for number in range(40):
        text = list(draw.choice(texts))
        for _ in range(draw.choice([0, 1, 2, 4])):
            text[draw.randrange(30)] = f"word{draw.randrange(200)}"
        fields = {"article": " ".join(text)}
        group = f"g{number // 15}-{draw.randrange(number + 1)}"
        rows.append(Example(str(number), group, "en", fields, ("x",)))
    parts = {"train": rows[:15], "dev": rows[15:30], "test": rows[30:]}
    kept, _ = drop_repeated_texts(parts, threshold=0.7)
    assert kept == by_all_pairs(parts, 0.7)
    assert any(len(kept[split]) < len(parts[split]) for split in parts)
    turned = {split: parts[split] for split in ("test", "train", "dev")}
    assert drop_repeated_texts(turned, threshold=0.7)[0] == kept
