import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

from grasp_lora.data.hub import (
    PUBLISHED_SETS,
    HubExamples,
    Source,
    load_hub,
    load_preset,
    split_published,
)
from grasp_lora.data.leaks import check_disjoint, drop_parallel
from grasp_lora.tasks.base import TASKS
from hub_server import serve

EXPORT = "refs/convert/parquet"
SETS_BY_ROLE = [(name, role) for name in PUBLISHED_SETS for role in ("source", "target")]
Row = Mapping[str, Any]


def questions(split: str, contexts: int, each: int = 5, language: str = "ar") -> list[Row]:
    """Return rows like in MLQA and XQuAD: the same ids in every language, with other words."""
    return [
        {
            "id": f"{split}-{c}-{q}",
            "context": f"{language} {split} {c} ".join(f"w{c}x{i}" for i in range(12)),
            "question": f"{q}?",
            "answers": {"answer_start": [0], "text": [f"w{c}x0"]},
        }
        for c in range(contexts)
        for q in range(each)
    ]


def articles(split: str, count: int) -> list[Row]:
    return [
        {"id": f"{split}-{i}", "url": "u", "title": "t", "summary": f"s{i}", "text": f"{split} {i}"}
        for i in range(count)
    ]


class Hub:
    """A load function that returns given rows by (repository, config, revision) and split."""

    def __init__(self, places: Mapping[Any, Any]) -> None:
        self.places = places
        self.asked: list[tuple[str, str | None, str | None, str]] = []

    def __call__(
        self,
        repo: str,
        config: str | None = None,
        *,
        split: str,
        revision: str | None,
    ) -> Dataset:
        self.asked.append((repo, config, revision, split))
        place = self.places.get((repo, config, revision))
        if place is None:
            raise DatasetNotFoundError(f"Dataset '{repo}' doesn't exist on the Hub")
        if isinstance(place, Exception):
            raise place
        if split not in place:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(place)}.')
        return Dataset.from_list(list(place[split]))


MLQA = {"validation": questions("validation", 80), "test": questions("test", 60)}
XLSUM = {split: articles(split, 150) for split in ("train", "validation", "test")}


def mlqa(revision: str | None = None) -> dict[tuple[str, str | None, str | None], Any]:
    return {("facebook/mlqa", "mlqa.ar.ar", revision): MLQA}


@pytest.mark.parametrize("preset", PUBLISHED_SETS.values(), ids=PUBLISHED_SETS)
def test_every_part_of_every_role_has_a_size_and_a_published_split(preset) -> None:
    assert set(preset.drawn_from) == {"official", "paper"}
    for protocol in preset.drawn_from.values():
        assert {role: list(parts) for role, parts in protocol.items()} == {
            "source": ["train", "dev", "test"],
            "target": ["train", "dev", "micro_dev", "test"],
        }
        for role, parts in protocol.items():
            assert list(preset.sizes[role]) == list(parts)
    assert preset.task in TASKS
    for called in preset.languages.values():
        assert all(called in (s.config or called) for s in preset.sources(called))


def test_languages_are_those_the_data_sets_have() -> None:
    names = set(PUBLISHED_SETS["xlsum"].languages.values())
    assert len(names) == 45
    assert PUBLISHED_SETS["xlsum"].languages["zh"] == "chinese_simplified"
    assert {"chinese_traditional", "serbian_latin", "pidgin", "kirundi"} <= names
    assert list(PUBLISHED_SETS["mlqa"].languages) == ["ar", "de", "en", "es", "hi", "vi", "zh"]
    assert len(PUBLISHED_SETS["xquad"].languages) == 12
    assert not any("XQuAD" in str(s) for s in PUBLISHED_SETS["xquad"].sources("ro"))


def test_places_are_tried_in_order_and_every_failure_is_kept(tmp_path: Path) -> None:
    script = tmp_path / "mlqa"
    script.mkdir()
    (script / "mlqa.py").write_text("")
    with pytest.raises(RuntimeError) as refused:
        load_dataset(str(script))
    places = mlqa(EXPORT) | {
        ("facebook/mlqa", "mlqa.ar.ar", None): refused.value,
        ("facebook/mlqa", "mlqa.ar.ar", "refs/pr/5"): ConnectionError("first\nsecond"),
    }
    found = load_preset("mlqa", "ar", load=Hub(places))
    assert str(found.used) == "facebook/mlqa mlqa.ar.ar at refs/convert/parquet"
    assert [(str(source), why) for source, why in found.tried] == [
        (
            "facebook/mlqa mlqa.ar.ar",
            "RuntimeError: Dataset scripts are no longer supported, but found mlqa.py",
        ),
        ("facebook/mlqa mlqa.ar.ar at refs/pr/5", "ConnectionError: first"),
    ]
    assert {name: len(rows) for name, rows in found.examples.items()} == {
        "validation": 400,
        "test": 300,
    }
    assert found.examples["test"][0].references == ("w0x0",)
    assert found.examples["test"][0].language == "ar"


def test_no_place_gives_one_error_with_every_reason_and_the_way_out() -> None:
    places = {("google/xtreme", "MLQA.ar.ar", None): {"validation": questions("v", 3)}}
    with pytest.raises(ValueError, match="no rows of mlqa ar could be loaded") as caught:
        load_preset("mlqa", "ar", load=Hub(places))
    text = str(caught.value)
    assert text.count("DatasetNotFoundError: Dataset 'facebook/mlqa' doesn't exist") == 3
    assert 'google/xtreme MLQA.ar.ar (ValueError: Unknown split "test"' in text
    assert "files: {train: FILE, dev: FILE, micro_dev: FILE, test: FILE}" in text


def test_a_place_whose_rows_do_not_fit_the_task_is_passed_over() -> None:
    odd = {split: [{"id": "1", "sentence": "x"}] for split in MLQA}
    places = {("facebook/mlqa", "mlqa.ar.ar", None): odd} | mlqa("refs/pr/5")
    found = load_preset("mlqa", "ar", load=Hub(places))
    assert found.used.revision == "refs/pr/5"
    assert "sentence" in found.tried[0][1]


def test_a_fault_that_is_not_the_place_is_not_hidden() -> None:
    places = {("facebook/mlqa", "mlqa.ar.ar", None): TypeError("a bug")}
    with pytest.raises(TypeError, match="a bug"):
        load_preset("mlqa", "ar", load=Hub(places))


def test_a_mirror_may_call_a_split_by_another_name() -> None:
    mirror = {"train": XLSUM["train"], "val": XLSUM["validation"], "test": XLSUM["test"]}
    hub = Hub({("ahmedelsayed/xlsum-arabic", None, None): mirror})
    found = load_preset("xlsum", "ar", load=hub)
    assert list(found.examples) == ["train", "validation", "test"]
    assert found.examples["validation"][0].id == "validation-0"
    assert [e.fields["article"] for e in found.examples["test"][:1]] == ["test 0"]
    with pytest.raises(ValueError, match="xlsum fr"):
        load_preset("xlsum", "fr", load=hub)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("squad", "en"), "unknown preset: 'squad'; choose one of: xlsum, mlqa, xquad"),
        (("mlqa", "fr"), "unknown language of mlqa: 'fr'; choose one of: ar, de, en"),
        (("mlqa", "ar", "mine"), "unknown protocol: 'mine'; choose one of: official, paper"),
    ],
)
def test_unknown_names_are_refused_with_those_there_are(given: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_preset(*given, load=Hub({}))
    with pytest.raises(ValueError, match="unknown role: 'both'"):
        load_preset("mlqa", "ar", role="both", load=Hub({}))


def test_only_published_splits_that_are_needed_are_read() -> None:
    hub = Hub(mlqa())
    load_preset("mlqa", "ar", role="source", load=hub)
    load_preset("mlqa", "ar", "paper", load=hub)
    assert [asked[-1] for asked in hub.asked] == ["test", "validation"]


def test_a_very_large_split_is_read_in_part_and_the_same_each_time(monkeypatch) -> None:
    monkeypatch.setattr("grasp_lora.data.hub.MAX_ROWS", 100)
    hub = Hub({("csebuetnlp/xlsum", "english", None): XLSUM})
    one, two = (load_preset("xlsum", "en", load=hub) for _ in range(2))
    assert len(one.examples["train"]) == one.published["train"].report.rows == 100
    assert one.published["train"].rows == 150
    assert one.examples == two.examples
    ids = [int(e.id.removeprefix("train-")) for e in one.examples["train"]]
    assert ids == sorted(ids)
    assert max(ids) > 100


@pytest.mark.parametrize("protocol", ["official", "paper"])
def test_the_parts_of_a_preset_come_from_their_published_splits_and_are_disjoint(protocol) -> None:
    found = load_preset("mlqa", "ar", protocol, load=Hub(mlqa()))
    split = split_published(found, PUBLISHED_SETS["mlqa"].sizes["target"], 3)
    assert {part: len(rows) for part, rows in split.parts.items()} == {
        "train": 50, "dev": 50, "micro_dev": 16, "test": 100
    }  # fmt: skip
    test = "test" if protocol == "official" else "validation"
    origins = {part: {e.id.split("-")[0] for e in rows} for part, rows in split.parts.items()}
    assert origins == {"train": {"validation"}, "dev": {"validation"}, "micro_dev": {"validation"},
                       "test": {test}}  # fmt: skip
    assert check_disjoint(split.parts, threshold=1.0) == ()
    assert split.dropped["micro_dev"] == 4
    assert split_published(found, PUBLISHED_SETS["mlqa"].sizes["target"], 3) == split
    assert split_published(found, PUBLISHED_SETS["mlqa"].sizes["target"], 4) != split


def test_xquad_has_room_for_a_source_that_shares_no_question_with_the_target() -> None:
    # 238 contexts of 5 questions are the 1,190 rows of XQuAD.
    target = load_preset(
        "xquad", "ar",
        load=Hub({("google/xquad", "xquad.ar", None): {"validation": questions("v", 238)}}),
    )  # fmt: skip
    rows = {"validation": questions("v", 238, language="en")}
    english = load_preset(
        "xquad", "en", role="source", load=Hub({("google/xquad", "xquad.en", None): rows})
    )
    for seed in range(5):
        parts = split_published(target, PUBLISHED_SETS["xquad"].sizes["target"], seed).parts
        used = [example for part in parts.values() for example in part]
        left = english.filtered(lambda rows, used=used: drop_parallel(rows, used)[0])
        source = split_published(left, PUBLISHED_SETS["xquad"].sizes["source"], seed).parts
        assert [len(part) for part in source.values()] == [700, 100, 100]
        both = {f"t/{k}": v for k, v in parts.items()} | {f"s/{k}": v for k, v in source.items()}
        assert check_disjoint(both, threshold=1.0) == ()


def hub_rows(count: int, **parts: str) -> HubExamples:
    hub = Hub({("a/b", None, None): {name: articles(name, count) for name in set(parts.values())}})
    return load_hub(Source("a/b"), parts, TASKS["summarization"], "en", load=hub)


def test_a_part_may_take_all_that_others_leave() -> None:
    found = hub_rows(20, train="train", dev="train", test="test")
    split = split_published(found, {"train": -1, "dev": 5, "test": -1}, 0)
    assert list(split.parts) == ["train", "dev", "test"]
    assert {part: len(rows) for part, rows in split.parts.items()} == {
        "train": 15, "dev": 5, "test": 20
    }  # fmt: skip
    assert {e.id for e in split.parts["train"]}.isdisjoint(e.id for e in split.parts["dev"])
    assert split_published(found, {"test": 3}, 0).parts.keys() == {"test"}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"train": -1, "dev": -1}, "train and dev are each to be all of .* 'train'.*slices"),
        ({"train": 20, "dev": -1}, "no row of the published split 'train' is left for dev"),
        ({"train": 15, "dev": 6}, "too few rows"),
        ({"train": -2}, "must be 0 or more, got -2"),
        ({"micro_dev": 3}, "unknown part: 'micro_dev'; choose one of: train, dev"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_published(hub_rows(20, train="train", dev="train"), sizes, 0)


def test_any_data_set_is_read_with_its_own_columns_and_recorded() -> None:
    rows = [{"key": i, "passage": f"p{i}", "q": "?", "gold": [f"p{i}"]} for i in range(3)]
    rows.append({"key": 9, "passage": "p9", "q": " ", "gold": ["p9"]})
    hub = Hub({("me/mine", "small", "v1"): {"train[:4]": rows}})
    columns = {"id": "key", "question": "q", "answers": "gold"}
    found = load_hub(
        Source("me/mine", "small", "v1"), {"test": "train[:4]"}, TASKS["qa"], "en",
        columns=columns, max_faulty=0.3, load=hub,
    )  # fmt: skip
    assert [e.id for e in found.examples["train[:4]"]] == ["0", "1", "2"]
    record = json.loads(json.dumps(found.record()))
    fingerprint = record["splits"]["train[:4]"].pop("fingerprint")
    assert fingerprint
    assert record == {
        "data_set": "me/mine",
        "config": "small",
        "revision": "v1",
        "splits": {
            "train[:4]": {"rows": 4, "read": 3, "left_out": {"empty question": 1},
                          "answers_outside": 0, "joined": 0, "blank_answers": 0,
                          "commit": None}
        },
        "drawn_from": {"test": "train[:4]"},
        "tried": [],
    }  # fmt: skip


def test_a_data_set_with_a_script_is_refused_with_the_branch_to_take() -> None:
    error = RuntimeError("Dataset scripts are no longer supported, but found b.py")
    with pytest.raises(ValueError, match=f"tried a/b .RuntimeError.*set revision: {EXPORT}"):
        load_hub(Source("a/b"), {"test": "test"}, TASKS["qa"], "en",
                 load=Hub({("a/b", None, None): error}))  # fmt: skip


def put(folder: Path, name: str, rows: Sequence[Row]) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)


@pytest.fixture(scope="module")
def hub_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a repository with a script and a Parquet copy, and one with Parquet files."""
    root = tmp_path_factory.mktemp("hub")
    main = root / "csebuetnlp__xlsum" / "main"
    main.mkdir(parents=True)
    (main / "README.md").write_text("XL-Sum")
    (main / "xlsum.py").write_text("")
    copy = root / "csebuetnlp__xlsum" / "refs_convert_parquet"
    for split, rows in XLSUM.items():
        put(copy, f"arabic/{split}/0000.parquet", rows)
        put(copy, f"english/xlsum-{split}.parquet", articles(f"english-{split}", 20))
    parquet = root / "google__xquad" / "main"
    configs = ""
    for language in ("ar", "en"):
        rows = questions(language, 3, language=language)
        put(parquet, f"xquad.{language}/validation-00000-of-00001.parquet", rows)
        configs += f"- config_name: xquad.{language}\n  data_files:\n  - split: validation\n"
        configs += f"    path: xquad.{language}/validation-*\n"
    (parquet / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    with serve(root) as url:
        yield url


LOAD = """
import json
from grasp_lora.data.hub import Source, load_hub, load_preset
from grasp_lora.tasks.base import TASKS
def told(load, *given, **named):
    try:
        found = load(*given, **named)
    except ValueError as error:
        return str(error)
    ids = {name: [e.id for e in rows] for name, rows in found.examples.items()}
    return found.record() | {"ids": ids}
summaries = TASKS["summarization"]
copy = Source("csebuetnlp/xlsum", None, "refs/convert/parquet"), {"test": "test"}, summaries, "en"
print(json.dumps([
    told(load_preset, "xlsum", "ar"), told(load_preset, "xlsum", "en", role="source"),
    told(load_preset, "xquad", "ar"), told(load_hub, *copy), told(load_preset, "mlqa", "ar"),
]))
"""


def loaded(url: str, home: Path, **environment: str) -> list[Any]:
    unset = {name: v for name, v in os.environ.items() if not name.startswith("HF_")}
    given = unset | {"HF_ENDPOINT": url, "HF_HOME": str(home)} | environment
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=given, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_hubs_own_client_loads_the_presets_and_finds_them_again_offline(
    hub_url: str, tmp_path: Path
) -> None:
    online = loaded(hub_url, tmp_path)
    arabic, english, xquad, nameless, mlqa_error = online
    script = "RuntimeError: Dataset scripts are no longer supported, but found xlsum.py"
    assert arabic["tried"] == [f"csebuetnlp/xlsum arabic: {script}"]
    assert (arabic["config"], arabic["revision"]) == ("arabic", EXPORT)
    assert {split: len(ids) for split, ids in arabic["ids"].items()} == dict.fromkeys(XLSUM, 150)
    assert all(i.startswith(f"{split}-") for split, ids in arabic["ids"].items() for i in ids)
    assert english["ids"]["test"][0] == "english-test-0"
    assert xquad["ids"] == {"validation": [row["id"] for row in questions("ar", 3)]}
    commits = [found["splits"][split]["commit"] for found, split in
               ((arabic, "test"), (english, "train"), (xquad, "validation"))]  # fmt: skip
    assert all(len(commit) == 40 for commit in commits)
    assert commits[0] == commits[1] != commits[2]
    assert "no file of the split test of default in the Parquet copy" in nameless
    assert mlqa_error.count("NotFoundError: ") == 4
    offline = loaded(hub_url, tmp_path, HF_HUB_OFFLINE="1")
    assert [found["ids"] for found in offline[:3]] == [found["ids"] for found in online[:3]]
    assert [found["splits"] for found in offline[:3]] == [found["splits"] for found in online[:3]]
    assert offline[4].count("OfflineModeIsEnabled") == 3
    assert "mlqa.ar.ar at refs/convert/parquet (LocalEntryNotFoundError: " in offline[4]


def test_splits_that_number_their_rows_alike_get_ids_of_their_own() -> None:
    def load(_repo: str, _config: str | None, **given: Any) -> Dataset:
        split = given["split"]
        return Dataset.from_list(
            [{"id": str(n), "article": f"{split} text {n}", "summary": "s"} for n in range(4)]
        )

    parts = {"train": "train", "test": "test"}
    found = load_hub(Source("a/b"), parts, TASKS["summarization"], "en", load=load)
    assert [e.id for e in found.examples["train"]] == [f"train/{n}" for n in range(4)]
    assert not check_disjoint(found.examples)
    apart = load_hub(Source("a/b"), {"test": "test"}, TASKS["summarization"], "en", load=load)
    assert [e.id for e in apart.examples["test"]] == ["0", "1", "2", "3"]
