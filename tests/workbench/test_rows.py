"""The rows of a run from every kind of place, and what is refused about them."""

import functools
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from grasp_lora.config.run_config import make_config
from grasp_lora.data.files import load_examples
from grasp_lora.data.hub import load_hub
from grasp_lora.data.splits import split_by_group
from grasp_lora.tasks.base import TASKS
from grasp_lora.workbench.rows import RunData, load_run_data
from jobs import write_rows


def rows_of(prefix: str, numbers: range, suffix: str = "") -> list[dict[str, Any]]:
    """Return questions with a context each; equal prefixes and numbers are parallel rows."""
    return [
        {
            "id": f"{prefix}{n}",
            "context": f"{prefix} house number {n} has {n + 2} rooms{suffix}.",
            "question": f"How many rooms has {prefix} house {n}{suffix}?",
            "answers": [f"{n + 2} rooms"],
        }
        for n in numbers
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def loaded(data: dict[str, Any], recipe: str = "auto", **options: Any) -> tuple[RunData, list[str]]:
    said: list[str] = []
    values = {"model": "smollm2", "data": data, "recipe": recipe}
    config = make_config(values, training=False)
    return load_run_data(config, said.append, **options), said


def target(folder: Path, **changes: Any) -> dict[str, Any]:
    path = write_rows(folder / "es.jsonl", range(30))
    rows = {"train": 8, "dev": 4, "micro_dev": 4, "test": 4}
    return {"language": "es", "files": str(path), "rows": rows} | changes


def test_source_rows_parallel_to_the_target_are_left_out_before_the_split(tmp_path):
    english = write(tmp_path / "en.jsonl", rows_of("q", range(30), " (en)"))
    source = {"language": "en", "files": english, "rows": {"train": 8}}
    data, said = loaded({"source": source, "target": target(tmp_path)})
    used = {e.id for rows in data.parts["target"].values() for e in rows}
    assert len(used) == 20
    assert not used & {e.id for e in data.parts["source"]["train"]}
    assert (
        "source: 20 rows left out, as they or others of their context share an id with a target "
        "row: an equal id means a translation"
    ) in said
    assert data.leaks == ()


def test_each_part_reads_its_own_split_of_a_json_of_splits(tmp_path):
    splits = {
        "train": rows_of("a", range(3)),
        "validation": rows_of("b", range(4)),
        "micro_dev": rows_of("c", range(5)),
        "test": rows_of("d", range(6)),
    }
    path = tmp_path / "all.json"
    path.write_text(json.dumps(splits), encoding="utf-8")
    parts = ("train", "dev", "micro_dev", "test")
    files = dict.fromkeys(parts, str(path))
    more = {"far": {"language": "es", "files": str(path)}}
    data, said = loaded(
        {"target": {"language": "es", "files": files}, "tests": more, "allow_leakage": True}
    )
    ids = {part: [e.id for e in data.parts["target"][part]] for part in parts}
    assert ids == {
        part: [row["id"] for row in rows] for part, rows in zip(parts, splits.values(), strict=True)
    }
    assert data.parts["tests"]["far"] == data.parts["target"]["test"]
    assert "all.json: the rows are those of its split 'validation'" in said
    with pytest.raises(ValueError, match="holds the splits 'train', .* no part is named to read"):
        loaded({"target": {"language": "es", "files": str(path)}})


def test_files_that_number_their_rows_alike_are_told_how_to_keep_them(tmp_path):
    def numbered(prefix, count):
        return [row | {"id": n} for n, row in enumerate(rows_of(prefix, range(count)))]

    spanish = target(tmp_path, files=write(tmp_path / "mine.jsonl", numbered("q", 30)))
    english = numbered("e", 30)
    source = {"language": "en", "rows": {"train": 10}}
    files = write(tmp_path / "en.jsonl", english)
    data, said = loaded({"source": source | {"files": files}, "target": spanish})
    (line,) = (line for line in said if "left out" in line)
    assert line.startswith("source: 20 rows left out, as they or others of their context share an")
    assert line.endswith(
        "if these ids only number the rows of each file, give one file other ids, or remove its "
        "id column, and the rows are kept"
    )
    assert len(data.parts["source"]["train"]) == 10

    own = [row | {"id": f"en-{row['id']}"} for row in english]
    none = [{k: v for k, v in row.items() if k != "id"} for row in english]
    for rows in (own, none):
        source = {"language": "en", "rows": {"train": 30}}
        source["files"] = write(tmp_path / "en.jsonl", rows)
        data, said = loaded({"source": source, "target": spanish})
        assert len(data.parts["source"]["train"]) == 30
        assert not any("left out" in line for line in said)


def test_a_question_of_a_translated_context_goes_too(tmp_path):
    english = rows_of("q", range(30), " (en)")
    english.append(english[0] | {"id": "extra", "question": "Something else?"})
    files = {"train": [0], "dev": [1], "micro_dev": [2], "test": [0]}
    parts = {
        part: str(write_rows(tmp_path / f"{part}.jsonl", [n + 100 * (part != "test") for n in ns]))
        for part, ns in files.items()
    }
    source = {
        "language": "en",
        "files": write(tmp_path / "en.jsonl", english),
        "rows": {"train": 29},
    }
    data, _ = loaded({"source": source, "target": {"language": "es", "files": parts}})
    assert {"q0", "extra"}.isdisjoint({e.id for e in data.parts["source"]["train"]})
    assert len(data.parts["source"]["train"]) == 29


def test_further_test_sets_stand_beside_the_targets_own(tmp_path):
    news = write(tmp_path / "news.jsonl", rows_of("n", range(9)))
    tests = {"news": {"language": "es", "files": news, "rows": 5}}
    data, said = loaded({"target": target(tmp_path), "tests": tests})
    assert data.test_sets() == {"test": ("target", "test"), "news": ("tests", "news")}
    assert len(data.parts["tests"]["news"]) == 5
    assert data.manifest()["tests"]["from"] == {"news": "news.jsonl"}
    assert "target labels used: 8 train, 4 dev, 4 micro_dev; tested on 9" in said


def test_a_test_set_that_holds_training_rows_is_refused_or_recorded(tmp_path):
    same = write(tmp_path / "news.jsonl", rows_of("q", range(30)))
    data = {
        "target": target(tmp_path),
        "tests": {"news": {"language": "es", "files": same}},
    }
    with pytest.raises(ValueError, match=r"16 pairs .* of tests/news .* --allow-leakage"):
        loaded(data)
    allowed, said = loaded(data | {"allow_leakage": True})
    assert len(allowed.leaks) == 16
    assert len(allowed.manifest()["leaks"]) == 16
    assert any("leakage, allowed: 16 pairs" in line for line in said)


def test_two_test_sets_may_share_rows(tmp_path):
    same = write(tmp_path / "news.jsonl", rows_of("n", range(9)))
    tests = {name: {"language": "es", "files": same} for name in ("one", "two")}
    data, _ = loaded({"target": target(tmp_path), "tests": tests})
    assert data.leaks == ()


def test_rows_from_python_take_the_place_of_files(tmp_path):
    rows = rows_of("p", range(20))
    given = {
        "target": {
            "train": Dataset.from_list(rows[:8]),
            "micro_dev": rows[8:12],
            "validation": rows[12:15],
            "test": rows[15:],
        }
    }
    data, _ = loaded({"target": {"language": "es"}}, given=given)
    found = {part: len(examples) for part, examples in data.parts["target"].items()}
    assert found == {"train": 8, "dev": 3, "micro_dev": 4, "test": 5}
    assert data.parts["target"]["train"][0].fields["context"] == rows[0]["context"]
    again, _ = loaded({"target": {"language": "es"}}, given=given)
    assert again.digest() == data.digest()
    changed = {"target": {**given["target"], "test": rows[15:19]}}
    other, _ = loaded({"target": {"language": "es"}}, given=changed)
    assert other.digest() != data.digest()


@pytest.mark.parametrize("rows", [{}, {"test": 5}, {"train": 9, "dev": 4, "micro_dev": 2}])
def test_one_set_from_python_is_divided_as_the_same_file_is(tmp_path, rows):
    given = rows_of("p", range(30))
    section = {"language": "es", "rows": rows}
    data, _ = loaded({"target": section}, given={"target": Dataset.from_list(given)})
    file = write(tmp_path / "rows.jsonl", given)
    same, _ = loaded({"target": section | {"files": file}})
    assert data.digest() == same.digest()
    drawn = {part: len(examples) for part, examples in data.parts["target"].items()}
    assert drawn.items() >= rows.items()
    assert all(drawn[part] for part in ("train", "dev", "micro_dev"))


def test_columns_and_another_task_reach_the_loader(tmp_path):
    rows = [
        {"nr": n, "swahili": f"maneno {n} ya kwanza", "english": f"words {n}"} for n in range(9)
    ]
    section = {
        "language": "sw",
        "files": {"test": write(tmp_path / "pairs.jsonl", rows)},
        "columns": {"id": "nr", "completion": "english"},
        "prompt": "Translate into English: {swahili}\nEnglish:",
    }
    data, _ = loaded({"task": "text-to-text", "target": section}, training=False)
    example = data.parts["target"]["test"][0]
    assert (example.id, example.references) == ("0", ("words 0",))
    assert dict(example.fields) == {"swahili": "maneno 0 ya kwanza"}


def test_rows_left_out_are_told(tmp_path):
    rows = rows_of("q", range(30)) + [rows_of("q", range(31))[30] | {"question": " "}]
    files = write(tmp_path / "mine.jsonl", rows)
    _, said = loaded({"target": target(tmp_path, files=files)})
    assert any("mine.jsonl: 1" in line and "empty question" in line for line in said)
    with pytest.raises(ValueError, match="max_faulty"):
        loaded({"max_faulty": 0.01, "target": target(tmp_path, files=files)})


def test_what_is_odd_in_a_file_or_a_published_split_is_told_once(tmp_path, monkeypatch):
    rows = [{"id": n, "article": f"Text {n}.", "highlights": f"One {n}.\nTwo."} for n in range(4)]

    def published(_repo: str, _config: str | None, **_options: Any) -> Dataset:
        return Dataset.from_list(rows[:2])

    monkeypatch.setattr(
        "grasp_lora.workbench.rows.load_hub", functools.partial(load_hub, load=published)
    )
    section = {"language": "en", "files": {"test": write(tmp_path / "mine.jsonl", rows)}}
    tests = {"cnn": {"language": "en", "files": {"hub": "me/cnn", "splits": {"test": "test"}}}}
    data, said = loaded(
        {"task": "summarization", "target": section, "tests": tests, "allow_leakage": True},
        training=False,
    )
    assert [e.references for e in data.parts["tests"]["cnn"]] == [
        ("One 0. Two.",),
        ("One 1. Two.",),
    ]
    told = [line.split(" had answers")[0] for line in said if "several lines" in line]
    assert told == ["mine.jsonl: 4 of 4 rows", "me/cnn test: 2 of 2 rows"]


def test_training_needs_rows_to_train_on_and_evaluation_does_not(tmp_path):
    section = {
        "language": "es",
        "files": {"test": write(tmp_path / "t.jsonl", rows_of("q", range(3)))},
    }
    with pytest.raises(ValueError, match="no examples in train and micro_dev; the search"):
        loaded({"target": section}, "grasp")
    with pytest.raises(ValueError, match="no examples in train; it is trained on: give"):
        loaded({"target": section})
    data, _ = loaded({"target": section}, training=False)
    assert data.test_sets() == {"test": ("target", "test")}


def test_one_file_is_divided_automatically_and_an_evaluation_needs_its_test_rows_alone(tmp_path):
    whole = target(tmp_path, rows={})
    data, _ = loaded({"target": whole})
    sizes = {name: len(rows) for name, rows in data.parts["target"].items()}
    assert sizes == {"train": 14, "dev": 12, "micro_dev": 4, "test": 0}
    tested, _ = loaded({"target": whole | {"rows": {"test": 26}}}, training=False)
    assert {name: len(rows) for name, rows in tested.parts["target"].items()} == {"test": 26}
    with pytest.raises(ValueError, match="rows"):
        loaded({"target": whole | {"rows": {"test": 26}}})


def test_nearly_equal_texts_of_one_file_do_not_stand_in_two_splits(tmp_path):
    stories = [" ".join(f"s{n}w{i}" for i in range(40)) for n in range(10)]
    rows = [
        {"id": f"{n}{twin}", "article": f"{story} {twin}", "summary": "x"}
        for n, story in enumerate(stories)
        for twin in ("a", "b")
    ]
    rows += [
        {"id": f"other{n}", "article": " ".join(f"w{n}x{i}" for i in range(20)), "summary": "y"}
        for n in range(20)
    ]
    section = {
        "language": "en",
        "files": write(tmp_path / "news.jsonl", rows),
        "rows": {"train": 20, "dev": 5, "micro_dev": 5, "test": 10},
    }
    data, said = loaded({"task": "summarization", "target": section})
    kept = data.parts["target"]
    assert len(kept["test"]) == 10
    assert len(kept["train"]) < 20
    assert any("target/train" in line and "nearly the same text" in line for line in said)
    assert data.leaks == ()


def test_rows_with_one_instruction_can_still_be_divided(tmp_path):
    rows = [
        {"instruction": "Translate.", "input": f"neno {n}", "completion": f"word {n}"}
        for n in range(9)
    ]
    section = {
        "language": "sw",
        "files": write(tmp_path / "pairs.jsonl", rows),
        "rows": {"train": 3, "dev": 2, "micro_dev": 2, "test": 2},
        "prompt": "{instruction}\n{input}\n",
    }
    data, _ = loaded({"task": "text-to-text", "target": section})
    assert {part: len(r) for part, r in data.parts["target"].items()} == section["rows"]


def test_a_parallel_test_set_of_another_language_loses_the_rows_trained_on(tmp_path):
    chinese = write(tmp_path / "zh.jsonl", rows_of("q", range(30), " (zh)"))
    tests = {"zh": {"language": "zh", "files": chinese}}
    data, said = loaded({"target": target(tmp_path), "tests": tests})
    parts = data.parts["target"]
    trained = {e.id for part in ("train", "dev", "micro_dev") for e in parts[part]}
    assert {e.id for e in data.parts["tests"]["zh"]} == {f"q{n}" for n in range(30)} - trained
    assert any(
        line.startswith("tests/zh: 16 rows left out") and "share an id with a training row" in line
        for line in said
    )


def test_the_split_has_a_seed_of_its_own(tmp_path):
    section = target(tmp_path)

    def test_ids(seed, split_seed):
        data = {"target": section, "split_seed": split_seed}
        config = make_config({"model": "smollm2", "seed": seed, "data": data}, training=False)
        rows = load_run_data(config, lambda _line: None).parts["target"]["test"]
        return [e.id for e in rows]

    assert test_ids(1, 7) == test_ids(2, 7) == test_ids(7, None)
    assert test_ids(1, 7) != test_ids(1, 8)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"targets": {}},
            "'targets', which the configuration does not have; give rows for target, tests",
        ),
        ({"target": {"holdout": []}}, "got 'holdout'"),
        ({"target": {"validation": [], "dev": []}}, "two are the same one"),
        ({"target": "rows.jsonl"}, "got a str"),
        ({"tests": []}, "got a list"),
        ({"tests": {"news": []}}, "none are configured"),
    ],
)
def test_rows_that_no_part_would_take_are_refused(given, said):
    with pytest.raises(ValueError, match=said):
        loaded({"target": {"language": "es"}}, given=given)


def test_columns_of_files_that_are_known_are_refused():
    with pytest.raises(ValueError, match="columns has no effect on files: builtin"):
        loaded({"target": {"language": "es", "columns": {"id": "nr"}}})


def test_hub_test_sets_are_one_published_split():
    tests = {"x": {"language": "es", "files": {"hub": "a/b", "splits": {"train": "train"}}}}
    with pytest.raises(ValueError, match=r"splits: \{test: NAME\}"):
        loaded({"target": {"language": "es"}, "tests": tests})


def extra(folder: Path, numbers: range, prefix: str = "x", **changes: Any) -> dict[str, Any]:
    return {"files": str(write_rows(folder / "extra.jsonl", numbers, prefix))} | changes


def test_extra_rows_are_a_role_of_their_own_with_one_set(tmp_path):
    section = extra(tmp_path, range(12), rows=5)
    data, said = loaded({"target": target(tmp_path), "extra": section})
    without, _ = loaded({"target": target(tmp_path)})
    assert data.parts["target"] == without.parts["target"]
    (rows,) = data.parts["extra"].values()
    assert len(rows) == 5
    assert {e.id for e in rows} < {f"x{n}" for n in range(12)}
    assert {e.language for e in rows} == {"es"}, "the language is that of the target"
    assert "extra rows, which are no labels: 5" in said
    assert "target labels used: 8 train, 4 dev, 4 micro_dev; tested on 4" in said
    record = data.manifest()["extra"]
    assert record["from"] == "extra.jsonl"
    assert record["splits"] == {"train": [e.id for e in rows]}
    assert "extra" not in without.manifest()
    assert data.digest() != without.digest()
    assert data.test_sets() == without.test_sets()
    again, _ = loaded({"target": target(tmp_path), "extra": section})
    assert again.parts == data.parts
    other, _ = loaded({"target": target(tmp_path), "extra": section, "split_seed": 5})
    assert other.parts["extra"] != data.parts["extra"]


def test_extra_rows_that_judge_elsewhere_are_left_out_by_their_ids(tmp_path):
    """A translation of parallel rows has their ids, other texts, and no place in training."""
    rows = rows_of("q", range(30), " (translated by a machine)")
    files = write(tmp_path / "mt.jsonl", rows)
    data, said = loaded({"target": target(tmp_path), "extra": {"files": files}})
    split = data.parts["target"]
    held = {e.id for part in ("dev", "micro_dev", "test") for e in split[part]}
    kept = {e.id for e in data.parts["extra"]["train"]}
    assert kept == {f"q{n}" for n in range(30)} - held
    assert kept > {e.id for e in split["train"]}, "other words for a train row teach no test row"
    assert data.leaks == ()
    assert (
        "extra: 12 rows left out, as they or others of their context share an id with a target "
        "dev, micro-dev or test row: an equal id means a translation"
    ) in said


def test_extra_rows_may_be_about_texts_that_are_trained_on(tmp_path):
    labelled, _ = loaded({"target": target(tmp_path)})
    first = labelled.parts["target"]["train"][0]
    rows = [row for row in rows_of("q", range(30)) if row["id"] == first.id]
    rows.append(rows[0] | {"id": "made", "question": "What has the house?"})
    files = write(tmp_path / "made.jsonl", rows)
    data, _ = loaded({"target": target(tmp_path), "extra": {"files": files}})
    assert [e.id for e in data.parts["extra"]["train"]] == [first.id, "made"]


def test_extra_rows_may_be_translations_of_source_rows(tmp_path):
    english = write(tmp_path / "en.jsonl", rows_of("e", range(12), " (en)"))
    source = {"language": "en", "files": english, "rows": {"train": 8, "dev": 4}}
    files = write(tmp_path / "mt.jsonl", rows_of("e", range(12), " (es)"))
    data, _ = loaded({"source": source, "target": target(tmp_path), "extra": {"files": files}})
    assert len(data.parts["extra"]["train"]) == 12
    assert len(data.parts["source"]["train"]) == 8


def test_extra_rows_nearly_equal_to_dev_rows_are_a_leak_that_may_be_allowed(tmp_path):
    labelled, _ = loaded({"target": target(tmp_path)})
    dev = labelled.parts["target"]["dev"][0]
    long = " ".join(f"word{n}" for n in range(40))
    pool = rows_of("q", range(30))
    for row in pool:
        row["context"] += f" {row['id']} {long}" if row["id"] == dev.id else ""
    spanish = target(tmp_path, files=write(tmp_path / "pool.jsonl", pool))
    (held,) = (row for row in pool if row["id"] == dev.id)
    near = held | {"id": "near", "context": held["context"] + " more", "answers": held["answers"]}
    values = {"target": spanish, "extra": {"files": write(tmp_path / "near.jsonl", [near])}}
    with pytest.raises(ValueError, match=r"'near' of extra/train \(nearly the same text, sim"):
        loaded(values)
    data, _ = loaded(values | {"allow_leakage": True})
    assert [leak.second for leak in data.leaks] == [("extra/train", "near")]
    data, _ = loaded(values | {"near_duplicates": 1.0})
    assert data.leaks == ()


def test_extra_rows_are_asked_as_the_target_unless_told_otherwise(tmp_path):
    prompt = "{context}|{question}"
    config = make_config(
        {
            "model": "x",
            "data": {
                "target": target(tmp_path, prompt=prompt),
                "extra": extra(tmp_path, range(3)),
            },
        },
        training=False,
    )
    section = config.data.extra
    assert section is not None
    assert (section.language, section.prompt, section.weight) == ("es", prompt, 1.0)
    assert make_config(config.to_dict(), training=False) == config
    own = {"language": "pt", "prompt": "{question}|{context}", "weight": 0.5}
    values = config.to_dict()
    values["data"]["extra"] |= own
    section = make_config(values, training=False).data.extra
    assert {name: getattr(section, name) for name in own} == own


def test_extra_rows_of_a_split_of_the_hub_come_from_the_split_named(tmp_path, monkeypatch):
    section = {"files": {"hub": "owner/name", "splits": {"test": "made"}}}
    with pytest.raises(ValueError, match=r"this is one published split; write splits: \{train: NA"):
        loaded({"target": target(tmp_path), "extra": section})
    rows = Dataset.from_list(rows_of("x", range(6)))
    asked = []

    def published(_repo, _config, split, revision):
        asked.append(split)
        return rows

    monkeypatch.setattr(
        "grasp_lora.workbench.rows.load_hub", functools.partial(load_hub, load=published)
    )
    section = {"files": {"hub": "owner/name", "splits": {"train": "made"}}}
    data, _ = loaded({"target": target(tmp_path), "extra": section})
    assert asked == ["made"]
    assert [e.id for e in data.parts["extra"]["train"]] == [f"x{n}" for n in range(6)]


def test_extra_rows_may_come_from_python(tmp_path):
    section = extra(tmp_path, range(3))
    rows = rows_of("p", range(4))
    values = {"target": target(tmp_path), "extra": section}
    data, _ = loaded(values, given={"extra": {"train": rows}})
    assert [e.id for e in data.parts["extra"]["train"]] == ["p0", "p1", "p2", "p3"]
    assert data.manifest()["extra"]["from"] == "given in Python"
    with pytest.raises(ValueError, match=r"splits \(train\) to rows, got 'dev'"):
        loaded(values, given={"extra": {"dev": rows}})
    with pytest.raises(ValueError, match="'extra', which the configuration does not have"):
        loaded({"target": target(tmp_path)}, given={"extra": {"train": rows}})


@pytest.mark.parametrize("files", ["one file", "a file for each part", "builtin", "Python"])
def test_no_order_of_keys_changes_who_is_in_which_split(tmp_path, files):
    rows = {"train": 8, "dev": 4, "micro_dev": 3, "test": 4}
    paths = {
        part: write_rows(tmp_path / f"{part}.jsonl", range(10 * n, 10 * n + 4))
        for n, part in enumerate(rows)
    }
    news = write_rows(tmp_path / "news.jsonl", range(50, 54), "n")
    more = {n: {"language": "es", "files": str(news), "rows": 2} for n in ("a", "b")}
    one = str(write_rows(tmp_path / "es.jsonl", range(60, 90)))

    def divided(order: list[str], tests: dict[str, Any]) -> RunData:
        section: dict[str, Any] = {"language": "es", "rows": {part: rows[part] for part in order}}
        options: dict[str, Any] = {}
        if files == "one file":
            section["files"] = one
        if files == "a file for each part":
            section = {"language": "es", "files": {part: str(paths[part]) for part in order}}
        if files == "Python":
            given = {
                part: [json.loads(line) for line in paths[part].read_text().splitlines()]
                for part in order
            }
            options = {"given": {"target": given}}
        return loaded({"target": section, "tests": tests}, **options)[0]

    usual = divided(list(rows), more)
    assert list(usual.parts["target"]) == list(rows)
    for order in itertools.permutations(rows):
        other = divided(list(order), dict(reversed(more.items())))
        assert other.manifest() == usual.manifest()


def test_the_division_of_the_usual_order_is_the_one_of_earlier_versions(tmp_path):
    write_rows(tmp_path / "es.jsonl", range(30))
    rows = {"test": 4, "micro_dev": 4, "dev": 4, "train": 8}
    data, _ = loaded({"target": target(tmp_path, rows=rows)})
    drawn = split_by_group(
        load_examples(tmp_path / "es.jsonl", TASKS["qa"], "es")[0],
        {"train": 8, "dev": 4, "micro_dev": 4, "test": 4},
        seed=42,
    )
    assert data.parts["target"] == drawn.parts


def known(folder: Path, rows: list[dict[str, Any]], role: str = "target") -> dict[str, Any]:
    """Return settings with a given adapter that was trained on these rows."""
    (folder / "adapter").mkdir(exist_ok=True)
    path = write(folder / f"known-{role}.jsonl", rows)
    return {role: str(folder / "adapter"), "trained_on": {role: path}}


def with_adapters(
    adapters: dict[str, Any], data: dict[str, Any], training: bool = True
) -> tuple[RunData, list[str]]:
    said: list[str] = []
    values = {"model": "smollm2", "data": data, "adapters": adapters}
    config = make_config(values, training=False)
    return load_run_data(config, said.append, training=training), said


def ids(rows: Any) -> set[str]:
    return {row.id if hasattr(row, "id") else row["id"] for row in rows}


@pytest.mark.parametrize("rows", [{}, {"test": 5}, {"train": 14, "dev": 6, "micro_dev": 4}])
@pytest.mark.parametrize("how", ["id", "text", "near"])
@pytest.mark.parametrize("seed", range(3))
def test_rows_that_a_given_adapter_was_trained_on_are_in_no_split_but_train(
    tmp_path, rows, how, seed
):
    long = " ".join(f"word{n}" for n in range(40))
    pool = rows_of("q", range(30))
    for row in pool:
        row["context"] += f" {row['id']} {long}"
    seen = [dict(row) for row in pool[::3]]
    for row in seen:
        if how != "id":
            row["id"] = f"other {row['id']}"
        if how == "near":
            row["context"] += " more"
        if how == "id":
            row["context"] = f"another text {row['id']} {row['answers']}"
    files = write(tmp_path / "pool.jsonl", pool)
    section = {"language": "es", "files": files, "rows": rows}
    data, said = with_adapters(known(tmp_path, seen), {"target": section, "split_seed": seed})
    forced = ids(pool[::3])
    split = data.parts["target"]
    held = set().union(*(ids(split[part]) for part in split if part != "train"))
    assert held
    assert not held & forced
    assert forced <= ids(split["train"])
    line = "adapters.target was trained on the 10 rows of known-target.jsonl: 10 of the target"
    assert any(one.startswith(line) for one in said)
    facts = {"from": "known-target.jsonl", "rows": 10, "in_train": 10}
    assert data.manifest()["trained_on"] == {"target": facts}
    assert data.leaks == ()


def test_a_context_goes_into_train_whole(tmp_path):
    pool = rows_of("q", range(20))
    twins = [row | {"id": f"twin {row['id']}", "question": "And how many doors?"} for row in pool]
    files = write(tmp_path / "pool.jsonl", pool + twins)
    section = {"language": "es", "files": files, "rows": {"train": 8, "dev": 20, "test": 8}}
    data, _ = with_adapters(known(tmp_path, pool[:3]), {"target": section})
    own = {name for row in pool[:3] for name in (row["id"], f"twin {row['id']}")}
    assert own <= ids(data.parts["target"]["train"])


def test_what_train_has_no_room_for_is_in_no_split(tmp_path):
    pool = rows_of("q", range(20))
    files = write(tmp_path / "pool.jsonl", pool)
    section = {"language": "es", "files": files, "rows": {"dev": 6, "train": 4, "test": 4}}
    data, _ = with_adapters(known(tmp_path, pool[:10]), {"target": section})
    split = data.parts["target"]
    assert ids(split["train"]) <= ids(pool[:10])
    assert ids(split["dev"]) | ids(split["test"]) == ids(pool[10:])


@pytest.mark.parametrize(
    ("rows", "seen", "said"),
    [
        ({"train": 8, "dev": 8, "test": 8}, 10, "need 24, there are 20 .*10 of them for train al"),
        ({}, 19, "from 20 contexts, 19 of them for train alone.*; dev, micro_dev need one each"),
        ({"test": 4}, 18, "need 4, there are 20 .*18 of them for train alone"),
    ],
)
def test_too_few_rows_beside_them_are_one_error_with_numbers(tmp_path, rows, seen, said):
    pool = rows_of("q", range(20))
    files = write(tmp_path / "pool.jsonl", pool)
    section = {"language": "es", "files": files, "rows": rows}
    with pytest.raises(ValueError, match=said):
        with_adapters(known(tmp_path, pool[:seen]), {"target": section})


def test_files_of_their_own_for_each_part_are_not_changed_but_refused(tmp_path):
    pool = rows_of("q", range(20))
    parts = {"train": pool[:8], "dev": pool[8:12], "test": pool[12:]}
    files = {name: write(tmp_path / f"{name}.jsonl", rows) for name, rows in parts.items()}
    data = {"target": {"language": "es", "files": files}}
    loaded, _ = with_adapters(known(tmp_path, pool[:8]), data)
    assert loaded.manifest()["trained_on"]["target"]["in_train"] == 8
    leak = r"'q9' of target/dev and 'q9' of adapters\.trained_on\.target \(the same id\)"
    with pytest.raises(ValueError, match=leak):
        with_adapters(known(tmp_path, pool[9:10]), data)
    allowed, _ = with_adapters(known(tmp_path, pool[9:10]), data | {"allow_leakage": True})
    assert len(allowed.leaks) == 1
    tests = {
        "far": {"language": "es", "files": write(tmp_path / "far.jsonl", rows_of("t", range(3)))}
    }
    with pytest.raises(ValueError, match="of tests/far and"):
        with_adapters(known(tmp_path, rows_of("t", range(1))), data | {"tests": tests})


def test_numbers_as_ids_are_no_rows_of_another_file_in_the_same_language(tmp_path):
    pool = [row | {"id": str(n)} for n, row in enumerate(rows_of("q", range(20)))]
    seen = [row | {"id": str(n)} for n, row in enumerate(rows_of("other", range(20)))]
    section = {"language": "es", "files": write(tmp_path / "pool.jsonl", pool)}
    data, _ = with_adapters(known(tmp_path, [*seen, pool[3] | {"id": "99"}]), {"target": section})
    assert data.manifest()["trained_on"]["target"]["in_train"] == 1
    assert "3" in ids(data.parts["target"]["train"])


def test_translations_that_a_source_adapter_was_trained_on_go_into_train(tmp_path):
    pool = rows_of("q", range(20))
    section = {"language": "es", "files": write(tmp_path / "pool.jsonl", pool)}
    adapters = known(tmp_path, rows_of("q", range(4), " (en)"), "source")
    data, _ = with_adapters(adapters, {"target": section, "source": {"language": "en"}})
    assert ids(pool[:4]) <= ids(data.parts["target"]["train"])


def test_a_given_target_adapter_of_unknown_rows_is_told_once(tmp_path):
    section = {"language": "es", "files": write(tmp_path / "pool.jsonl", rows_of("q", range(20)))}
    adapters = known(tmp_path, [])
    del adapters["trained_on"]
    for training in (True, False):
        _, said = with_adapters(adapters, {"target": section}, training)
        about = [line for line in said if "adapters.trained_on.target: FILE" in line]
        assert len(about) == training
    data, _ = with_adapters({}, {"target": section, "source": {"language": "en"}})
    digest = data.digest_of("target", "train")
    marker = {"key": {"examples": {"target/train": digest}}}
    (tmp_path / "adapter" / "stage.json").write_text(json.dumps(marker))
    _, said = with_adapters(adapters, {"target": section})
    assert not any("trained_on" in line for line in said), "it was trained here, on these rows"


def test_the_published_splits_of_the_hub_keep_them_out_too(tmp_path, monkeypatch):
    published = {
        "train": rows_of("a", range(10)),
        "validation": rows_of("b", range(10)),
    }

    def load(_repo, _config, split, revision):
        return Dataset.from_list(published[split])

    monkeypatch.setattr(
        "grasp_lora.workbench.rows.load_hub", functools.partial(load_hub, load=load)
    )
    hub = {"hub": "o/n", "splits": {"train": "train", "dev": "validation", "test": "validation"}}
    section = {"language": "es", "files": hub, "rows": {"train": 4, "dev": 3, "test": 3}}
    seen = published["train"][:3] + published["validation"][:4]
    data, _ = with_adapters(known(tmp_path, seen), {"target": section})
    split = data.parts["target"]
    assert ids(published["train"][:3]) <= ids(split["train"])
    assert ids(split["dev"]) | ids(split["test"]) == ids(published["validation"][4:])
