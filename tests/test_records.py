"""Tables of records give back what was put in, and are never half written."""

import json
import math

import pyarrow.parquet as pq
import pytest
from benchmarks import records

EDGES = {
    "nothing": {"job": "a-s1", "zeros": None, "losses": None, "none": [], "empty": {}},
    "numbers": {"job": "a-s2", "zeros": 0.0, "steps": 3, "ratio": 1.0, "minus": -0.0, "on": True},
    "unbounded": {"job": "a-s3", "zeros": math.nan, "ratio": math.inf, "steps": 2**40},
    "nested": {"job": "a-s4", "losses": {"dev": [1.5, None, 0.1 + 0.2], "micro_dev": []}},
    "points": {"job": "a-s5", "dev": [[0, 2.0], [5, 1.0]], "rows": [["dev", "q1"], ["dev", "q2"]]},
    "mixed": {"job": "a-s6", "steps": 3.0, "ratio": 1, "on": "yes", "dev": [], "huge": 2**70},
    "uneven": {"job": "a-s7", "findings": [{"name": "x"}, {"name": "y", "rows": 4}, 5, "z"]},
    "dotted": {"job": "a-s8", "by ratio": {"0.5": {"loss": 1.0}, "1": {"loss": 2}}, "text": "é"},
    "reversed": {"ratio": 0.25, "dev": [[1, 1], [2.0, 2]], "job": "a-s9", "zeros": 1.0},
}


@pytest.mark.parametrize("names", [[name] for name in EDGES] + [list(EDGES)], ids=", ".join)
def test_every_value_comes_back_as_it_was_and_of_its_type(tmp_path, names):
    table = tmp_path / "en-es.parquet"
    wanted = {EDGES[name]["job"]: EDGES[name] for name in names}
    records.write(table, {job: [record] for job, record in wanted.items()})
    # The text of a value tells 1, 1.0 and True apart, and -0.0 from 0.0; nan is not equal to nan.
    assert repr(records.read_runs(table)) == repr(wanted)


def test_a_search_has_a_record_a_round_in_their_order(tmp_path):
    rounds = [{"round": number, "rows": ["q"] * number} for number in (0, 1, 2, 10)]
    records.write(tmp_path / "en-es.parquet", {"grasp-restart-s42": rounds})
    assert records.read(tmp_path / "en-es.parquet") == {"grasp-restart-s42": rounds}


def test_numbers_are_columns_that_can_be_filtered(tmp_path):
    table = tmp_path / "en-es.parquet"
    for job, loss in (("grasp-restart-s42", 1.5), ("grasp-restart-s7", 1.25), ("source", 2.0)):
        record = {"job": job, "scores": {"test": {"loss": loss}}, "best": {"step": 3}}
        records.append(table, {job: [record]})
    chosen = [("method", "==", "grasp-restart"), ("scores.test.loss", "<", 1.4)]
    (found,) = pq.read_table(table, filters=chosen).to_pylist()
    assert (found["job"], found["seed"], found["best.step"]) == ("grasp-restart-s7", 7, 3)
    assert pq.read_table(table).column("seed").to_pylist() == [42, 7, None]


def test_a_job_is_added_once_to_a_collection(tmp_path):
    table = tmp_path / "en-es.parquet"
    assert records.append(table, {"a": [{"x": 1}]}) == 1
    before = table.read_bytes()
    with pytest.raises(ValueError, match="runs has a already"):
        records.append(table, {"b": [{"x": 2}], "a": [{"x": 3}]})
    assert table.read_bytes() == before
    assert records.append(table, {"b": [{"x": 2}], "a": [{"x": 3}]}, skip_known=True) == 1
    assert records.append(table, {"a": [{"x": 4}]}, "repeats") == 1
    assert records.read_runs(table) == {"a": {"x": 1}, "b": {"x": 2}}
    assert records.jobs(table, "repeats") == {"a"}
    assert records.jobs(tmp_path / "en-ar.parquet") == set()
    assert records.read(table, "none") == records.read(tmp_path / "en-ar.parquet") == {}


def test_a_write_that_fails_leaves_the_old_table_and_no_other_file(tmp_path, monkeypatch):
    table = tmp_path / "en-es.parquet"
    records.append(table, {"a": [{"x": 1}]})
    before = table.read_bytes()

    def fails(*arguments):
        raise OSError("no space is left")

    monkeypatch.setattr(pq.ParquetWriter, "add_key_value_metadata", fails)
    with pytest.raises(OSError, match="no space"):
        records.append(table, {"b": [{"x": 2}]})
    assert list(tmp_path.iterdir()) == [table]
    assert table.read_bytes() == before


@pytest.mark.parametrize(
    "record", [{"job": "another"}, {"keys": 1}, {"collection": "x"}, {"a.b": 1}], ids=str
)
def test_a_record_whose_keys_would_be_mistaken_is_refused(tmp_path, record):
    with pytest.raises(ValueError, match="a: "):
        records.append(tmp_path / "en-es.parquet", {"a": [record]})
    assert list(tmp_path.iterdir()) == []


def test_tables_are_found_by_what_they_hold(tmp_path):
    for pair, collection in (("en-es", "runs"), ("en-ar", "runs"), ("en-sw", "answering")):
        records.append(tmp_path / f"{pair}.parquet", {"a": [{"x": 1}]}, collection)
    assert [one.stem for one in records.tables_with(tmp_path, "runs")] == ["en-ar", "en-es"]
    with pytest.raises(ValueError, match="holds 'run'; there are: answering, runs"):
        records.tables_with(tmp_path, "run")


def test_rows_of_a_table_are_shown(tmp_path, capsys):
    table = tmp_path / "en-es.parquet"
    for job, ratio, loss in (("grid-0.2-s42", 0.2, 1.25), ("grid-0.4-s7", 0.4, 1.5)):
        record = {"job": job, "ratio": ratio, "scores": {"test": {"loss": loss}}, "verdict": None}
        records.append(table, {job: [record]})
    records.append(table, {"zero-shot": [{"not_applicable": "why"}]}, "repeats")
    records.main(["show", str(table), "--collection", "runs"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| collection | job | ratio | loss |"
    assert lines[2:] == [
        "| runs | grid-0.2-s42 | 0.2 | 1.25 |",
        "| runs | grid-0.4-s7 | 0.4 | 1.5 |",
    ]
    records.main(["show", str(table), "--method", "grid-0.4", "zero-shot", "--seed", "7"])
    assert capsys.readouterr().out.splitlines()[2:] == ["| runs | grid-0.4-s7 | 0.4 | 1.5 |"]


def test_files_that_runs_wrote_are_added(tmp_path, capsys):
    rounds = [{"round": 0, "ratio": 0.5}, {"round": 1, "ratio": 0.25}]
    (tmp_path / "grasp-s42.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rounds))
    (tmp_path / "plain-s42.json").write_text(json.dumps({"seed": 42}, indent=2))
    files = [str(tmp_path / name) for name in ("grasp-s42.jsonl", "plain-s42.json")]
    records.main(["add", str(tmp_path / "t.parquet"), *files, "--collection", "former"])
    found = records.read(tmp_path / "t.parquet", "former")
    assert found == {"grasp-s42": rounds, "plain-s42": [{"seed": 42}]}
    assert "2 jobs added" in capsys.readouterr().out


def test_all_that_is_recorded_can_be_read():
    tables = sorted(records.FOLDER.rglob("*.parquet"))
    assert sum(table.stat().st_size for table in tables) < 2_000_000
    runs = [records.read_runs(table) for table in records.tables_with(records.FOLDER, "runs")]
    assert len(runs) == 4
    for job, record in (item for known in runs for item in known.items()):
        assert record["job"] == job
        values = record["rows"]["test"]["values"]
        assert {len(one) for one in values.values()} == {len(record["rows"]["test"]["ids"])}
