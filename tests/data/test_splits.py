import json
import random
from collections.abc import Iterable

import pytest

from grasp_lora.data.splits import (
    auto_sizes,
    label_budget,
    manifest,
    split_auto,
    split_by_group,
)
from grasp_lora.tasks.records import Example, text_key


def rows(*group_sizes: int) -> list[Example]:
    return [
        row(f"{g}.{i}", f"context {g}", f"question {i}")
        for g, size in enumerate(group_sizes)
        for i in range(size)
    ]


def row(name: str, context: str, question: str = "q") -> Example:
    fields = {"context": context, "question": question}
    return Example(name, text_key(context), "en", fields, ("a",))


def groups(part: Iterable[Example]) -> set[str]:
    return {example.group for example in part}


@pytest.mark.parametrize("seed", range(5))
def test_splits_have_exact_sizes_and_share_no_group(seed: int) -> None:
    split = split_by_group(rows(*[3] * 20), {"train": 10, "dev": 7, "none": 0, "test": 9}, seed)
    assert {name: len(part) for name, part in split.parts.items()} == {
        "train": 10, "dev": 7, "none": 0, "test": 9
    }  # fmt: skip
    assert split.dropped == {"train": 2, "dev": 2, "none": 0, "test": 0}
    seen = [groups(part) for part in split.parts.values()]
    assert sum(map(len, seen)) == len(set().union(*seen))


def test_split_depends_on_the_seed_but_not_on_the_order_of_groups_or_the_global_generator() -> None:
    examples = rows(*[2] * 30)
    shuffled = examples[30:] + examples[:30]
    sizes = {"train": 20, "test": 10}
    random.seed(1)
    state = random.getstate()
    one = split_by_group(examples, sizes, 7)
    assert random.getstate() == state
    assert split_by_group(shuffled, sizes, 7) == one
    assert split_by_group(examples, sizes, 8) != one


def test_surplus_rows_of_a_group_go_to_no_split() -> None:
    split = split_by_group(rows(5, 5), {"train": 3, "dev": 5}, 0)
    used = {example.id for part in split.parts.values() for example in part}
    assert len(used) == 8
    assert split.dropped == {"train": 2, "dev": 0}
    assert groups(split.parts["train"]).isdisjoint(groups(split.parts["dev"]))


def test_too_few_rows_are_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match="need 9, there are 8 .0 of them.*'dev' gets only 3"):
        split_by_group(rows(*[1] * 8), {"train": 5, "dev": 4}, 0)
    with pytest.raises(ValueError, match="need 6, there are 6 .2 of them not usable"):
        split_by_group(rows(3, 3), {"a": 1, "b": 5}, 0)


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="'dev' must be 0 or more, got -1"):
        split_by_group(rows(1), {"dev": -1}, 0)


def test_auto_sizes_keep_the_published_proportion() -> None:
    assert auto_sizes(116) == {"train": 50, "dev": 50, "micro_dev": 16}
    for n_rows in range(8, 400):
        sizes = auto_sizes(n_rows)
        assert sum(sizes.values()) == n_rows
        assert min(sizes.values()) >= 1
        for name, share in (("train", 50), ("dev", 50), ("micro_dev", 16)):
            assert abs(sizes[name] - n_rows * share / 116) < 2


def test_auto_sizes_refuse_fewer_than_eight_rows() -> None:
    with pytest.raises(ValueError, match="7 labelled rows.*at least 8"):
        auto_sizes(7)


@pytest.mark.parametrize(
    "sizes", [[1] * 116, [5] * 23, [30, 30, 30], [8, 8, 8, 8], [40, 1, 1, 1, 1]]
)
def test_split_auto_uses_every_row_once_with_whole_groups(sizes: list[int]) -> None:
    for seed in range(10):
        split = split_auto(rows(*sizes), seed)
        assert list(split.parts) == ["train", "dev", "micro_dev"]
        assert all(split.parts.values())
        assert sum(map(len, split.parts.values())) == sum(sizes)
        assert sum(len(groups(part)) for part in split.parts.values()) == len(sizes)
    if set(sizes) == {1}:
        assert label_budget(split.parts) == auto_sizes(116)


def test_split_auto_refuses_two_contexts() -> None:
    with pytest.raises(ValueError, match="from 2 contexts"):
        split_auto(rows(5, 5), 0)


def test_manifest_is_plain_json_and_its_hash_follows_the_ids() -> None:
    parts = {"train": rows(2), "dev": rows(1)}
    record = manifest(parts)
    assert json.loads(json.dumps(record)) == record
    assert record["splits"] == {"train": ["0.0", "0.1"], "dev": ["0.0"]}
    assert manifest(parts) == record
    assert manifest({"train": rows(1), "dev": rows(2)})["sha256"] != record["sha256"]


def test_label_budget_counts_rows_of_each_split() -> None:
    assert label_budget({"train": rows(2, 3), "micro_dev": []}) == {"train": 5, "micro_dev": 0}
