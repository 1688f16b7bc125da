"""The page of recipes: rows, tables and goals are those of the records; what is kept stays."""

import json
from types import SimpleNamespace

import pytest
from benchmarks import recipes, recipes_report, recorded, records
from benchmarks.recipes_report import AUTO, differences, goals, score

from grasp_lora.base.files import jsonable
from grasp_lora.config.run_config import load_config
from helpers import tiny_backbone_folder
from jobs import job, of_adapters, write_job

FIRST = "adapters-42"


def fixed_run(table, name, loss, tokens=100, f1=None, collection=FIRST, **changes):
    """Record a run of a fixed recipe; a plain run has 100 tokens."""
    scores = {"loss": loss, "rougeL": 10 * loss} | ({} if f1 is None else {"token_f1": f1})
    record = {
        "job": name,
        "scores": {"test": scores},
        "losses": {"micro_dev": [loss], "dev": [loss + 1] * 3},
        "price": {"tokens": tokens},
        "plain_tokens": 100,
    }
    records.append(table, {name: [jsonable(record | changes)]}, collection)


def auto_run(table, seed, losses, simple, interval=(0.1, 0.5), plain_runs=4.5, **changes):
    """Record a run that chose, by the losses of its test examples and of the best simple system."""
    gain = None if interval is None else {"gain": 0.3, "interval": interval}
    loss = sum(losses) / len(losses)
    record = {
        "recipe": {"ships": f"way {seed}", "dev_loss": 0.75, "gain": gain},
        "scores": {"test": {"loss": loss, "rougeL": 99.0}},
        "rows": {"test": {"values": {"loss": losses}}},
        "simple_losses": simple,
        "plain_runs": plain_runs,
        "price": {"tokens": 450},
    }
    collection = changes.pop("collection", FIRST)
    records.append(table, {f"auto-s{seed}": [jsonable(record | changes)]}, collection)


@pytest.fixture
def kept(tmp_path):
    """Records of two pairs and a new one."""
    folder = tmp_path / "kept"
    spanish, swahili, hindi = (folder / f"{pair}.parquet" for pair in ("en-es", "en-sw", "en-hi"))
    auto_run(spanish, 42, [1.0, 2.0], [1.5, 2.0])
    auto_run(spanish, 1337, [2.0, 2.0], [2.0, 2.1], plain_runs=3.5)
    fixed_run(spanish, "average-finetuned-s42", 1.6, f1=40.0)
    fixed_run(spanish, "average-finetuned-s1337", 2.2, tokens=80)
    fixed_run(spanish, "average", 2.5, tokens=0)
    fixed_run(spanish, "source-finetuned-labelled-s42", 1.45, tokens=260, losses=None)
    records.append(spanish, {"late-merge-labelled-s42": [{"not_applicable": "ranks"}]}, FIRST)
    auto_run(swahili, 42, [3.0], [3.0], interval=None)
    fixed_run(swahili, "average-finetuned-s42", 3.25)
    fixed_run(swahili, "average-finetuned-s7", 1.0)  # no run that chose has this seed
    fixed_run(swahili, "average", 2.875)
    auto_run(hindi, 42, [1.25], [1.5])
    fixed_run(hindi, "average-finetuned-s42", 1.5)
    fixed_run(hindi, "average", 1.24)
    return folder


def test_a_row_is_a_recorded_run(kept):
    rows = recipes_report.rows_of(kept)
    assert [(row["pair"], row["recipe"], row["seed"]) for row in rows] == [
        *(("en-es", AUTO, seed) for seed in (42, 1337)),
        ("en-es", "source-finetuned-labelled", 42),
        ("en-es", "average", 42),
        *(("en-es", "average-finetuned", seed) for seed in (42, 1337)),
        ("en-sw", AUTO, 42),
        ("en-sw", "average", 42),
        *(("en-sw", "average-finetuned", seed) for seed in (7, 42)),
        ("en-hi", AUTO, 42),
        ("en-hi", "average", 42),
        ("en-hi", "average-finetuned", 42),
    ]
    assert rows[0] == {
        "pair": "en-es",
        "new_pair": False,
        "seed": 42,
        "adapters_seed": 42,
        "recipe": AUTO,
        "ships": "way 42",
        "dev_loss": 0.75,
        "scores": {"test": {"loss": 1.5, "exact_match": None, "token_f1": None, "rougeL": 99.0}},
        "plain_runs": 4.5,
        "covered": True,  # 1.75 - 1.5 lies in [0.1, 0.5]
    }
    assert rows[1]["covered"] is False  # 2.05 - 2.0 does not
    assert rows[2]["dev_loss"] is None, "trained on every label"
    assert rows[2]["plain_runs"] == 2.6
    average = rows[4]
    assert (average["ships"], average["covered"]) == (None, None)
    assert average["dev_loss"] == pytest.approx((1.6 + 3 * 2.6) / 4)
    assert average["scores"]["test"]["token_f1"] == 40.0
    assert [row["new_pair"] for row in rows] == [False] * 10 + [True] * 3


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.1, 0.5), True),
        ((0.25, 0.5), True),
        ((0.0, 0.25), True),
        ((0.26, 0.5), False),
        ((-0.5, 0.24), False),
        ((None, 0.5), None),
        (None, None),
    ],
)
def test_an_interval_covers_the_gain_on_the_test_examples(interval, expected):
    gain = None if interval is None else {"interval": interval}
    record = {"recipe": {"gain": gain}, "simple_losses": [1.0, 2.0]}
    record["rows"] = {"test": {"values": {"loss": [1.5, 1.0]}}}  # a gain of 0.25
    assert recipes_report.covered(record) is expected
    assert recipes_report.covered(record | {"simple_losses": None}) is None


def test_recipes_are_held_against_the_same_seed_and_adapters(kept):
    table = kept / "en-es.parquet"
    auto_run(table, 42, [3.0], [3.0], collection="adapters-7")
    fixed_run(table, "average", 4.5, collection="adapters-7")
    rows = recipes_report.rows_of(kept)
    loss = score("loss")
    assert differences(rows, "average-finetuned", loss) == pytest.approx(
        {"en-es": (1.5 - 1.6 + 2.0 - 2.2) / 2, "en-sw": -0.25, "en-hi": -0.25}
    )
    assert differences(rows, "average", loss) == pytest.approx(
        {"en-es": (1.5 - 2.5 + 2.0 - 2.5 + 3.0 - 4.5) / 3, "en-sw": 0.125, "en-hi": 0.01}
    )
    known = [row for row in rows if not row["new_pair"]]
    assert recipes_report.whole_differences(known, "source-finetuned-labelled") is None
    # -0.15 and -0.25 against -1.0 and 0.125: the fine-tuned average is nearer.
    assert recipes_report.best_fixed(known) == "average-finetuned"


def test_the_page_holds_tables_of_the_records_below_its_prose(kept, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "recipes.md").write_text(f"mine\n{recipes_report.BELOW}\nold tables\n")
    main = tmp_path / "main"
    fixed_run(main / "en-es.parquet", "average-finetuned-s42", 0.125, collection="runs")
    where = ["--records", str(kept), "--main-records", str(main)]
    recipes.main(["tables", *where, "--out", str(out)])
    text = (out / "recipes.md").read_text()
    assert text.startswith(f"mine\n{recipes_report.BELOW}\n\n## Goals")
    assert "old tables" not in text
    for line in (
        "| **auto** | 1.750 (2) | 3.000 (1) | 2.375 |",
        "| `average-finetuned` | 1.900 (2) | 2.125 (2) | 2.013 |",
        "| `source-finetuned-labelled` | 1.450 (1) | – | – |",
        "| `average-finetuned` (best in hindsight) | -0.150 | -0.250 | -0.200 |",
        "| `source-finetuned-labelled` | +0.050 | – | – |",
        "| **auto** | 4.00 (2) | 4.50 (1) | 4.50 (1) | 4.33 |",
        "| `average-finetuned` | 0.90 (2) | 1.00 (2) | 1.00 (1) | 0.97 |",
        "| en-es | `average-finetuned` | – | 40.0 (1) | 19.0 (2) |",
        "| en-es | way 1337 | 42 | 1337 | 0.750 | 2.000 | 3.50 | no |",
        "| en-sw | way 42 | 42 | 42 | 0.750 | 3.000 | 4.50 | – |",
        # In a table of its own, and in no mean above.
        "| `average-finetuned` | 0.125 (1) |",
        "| loss below average-finetuned | at least 0.08 | met | +0.200 |",
        "| intervals that hold the test gain, of 3 | at least 0.9 | not met | 0.67 |",
    ):
        assert line in text.splitlines(), line
    assert json.loads((out / "recipes.json").read_text()) == recipes_report.rows_of(kept)
    assert (out / "recipes" / "prices.png").exists()
    assert (out / "recipes" / "beside.png").exists()


def test_the_pictures_are_drawn(kept, tmp_path, drawing):
    main = tmp_path / "main"
    fixed_run(main / "en-es.parquet", "average-finetuned-s42", 0.125, collection="runs")
    recipes_report.write(kept, main, tmp_path / "out")
    for name in ("prices.png", "beside.png"):
        picture = (tmp_path / "out" / "recipes" / name).read_bytes()
        assert picture.startswith(b"\x89PNG")


def test_no_records_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no recorded run"):
        recipes_report.rows_of(tmp_path)


def row(pair, recipe, loss, f1=None, rouge=None, plain_runs=1.0, covered=None):
    test = {"loss": loss, "exact_match": None, "token_f1": f1, "rougeL": rouge}
    return {
        "pair": pair, "new_pair": pair == "en-hi", "seed": 42, "adapters_seed": 42,
        "recipe": recipe, "ships": "way", "dev_loss": 0.5, "scores": {"test": test},
        "plain_runs": plain_runs, "covered": covered,
    }  # fmt: skip


def measured(rows):
    """Return the start of each goal -> whether it is met."""
    names = ["best", "worst", "average", "answers", "paper", "scaled", "price", "new", "held"]
    return dict(zip(names, (one.met for one in goals(rows)), strict=True))


PAIRS = ("a", "b", "c", "d")


def test_goals_are_met_at_their_bounds_and_not_beyond():
    def rows(gaps, saved, below=0.0):
        """Auto at 1 on four pairs, the best fixed recipe off by gaps, others above it by saved."""
        found = [row(pair, AUTO, 1.0, f1=50.0) for pair in PAIRS]
        found += [
            row(pair, "source-finetuned-3x", 1.0 - gap)
            for pair, gap in zip(PAIRS, gaps, strict=True)
        ]
        for name, size in saved.items():
            found += [row(pair, name, 1.0 + size - below, f1=40.0) for pair in PAIRS]
        return found

    saved = {"average-finetuned": 0.08, "grasp-paper": 0.08, "grasp-paper-scaled": 0.15}
    at = measured(rows((0.015, -0.015, 0.015, -0.015), saved))
    assert at["best"] is at["worst"] is at["average"] is at["paper"] is at["scaled"] is True
    beyond = measured(rows((0.016, -0.015, 0.015, -0.015), saved, below=0.0001))
    assert beyond["best"] is beyond["worst"] is beyond["average"] is False
    assert beyond["paper"] is beyond["scaled"] is False
    assert measured(rows((0.015, -0.016, 0.015, -0.016), saved))["best"] is True


def test_a_published_recipe_that_is_not_recorded_is_taken_from_the_main_comparison():
    rows = [row(pair, AUTO, 1.0 + more) for pair in PAIRS for more in (0, 1)]
    losses = {"grasp-paper-scaled": [1.6, 1.7], "average-finetuned": [9.0]}
    others = dict.fromkeys((*PAIRS, "e"), losses)
    found = {one.about: one for one in goals(rows, others)}
    scaled = found["loss below grasp-paper-scaled in the main comparison"]
    assert (scaled.measured, scaled.met) == ("+0.150", True)
    assert found["loss below average-finetuned"].met is None
    part = dict.fromkeys(PAIRS[1:], losses)
    assert {o.about: o.met for o in goals(rows, part)}["loss below grasp-paper-scaled"] is None


@pytest.mark.parametrize(("better", "met"), [(2, False), (3, True), (4, True)])
def test_answers_are_judged_by_f1_and_headlines_by_rouge(better, met):
    rows = []
    for place, pair in enumerate(PAIRS):
        theirs = 40.0 if place < better else 50.0  # level is not better
        f1 = (None, None) if pair == "a" else (50.0, theirs)
        # What a pair of questions has for ROUGE-L counts for nothing.
        rouge = (50.0, theirs) if pair == "a" else (theirs, 50.0)
        rows.append(row(pair, AUTO, 1.0, f1[0], rouge[0]))
        rows.append(row(pair, "average-finetuned", 1.0, f1[1], rouge[1]))
    assert measured(rows)["answers"] is met


def test_prices_and_intervals_are_those_of_all_pairs_and_the_new_pairs_stand_alone():
    def rows(price, held, loss):
        found = [row("a", AUTO, 1.0, plain_runs=price)]
        found += [row("a", AUTO, 1.0, covered=place < held) | {"seed": place} for place in range(9)]
        found += [row("en-hi", AUTO, loss, covered=True), row("en-hi", "average", 1.5)]
        return [*found, row("en-hi", "grasp-paper", 1.0), row("a", "grasp-paper", 2.0)]

    at, beyond = measured(rows(5.0, 8, 1.02)), measured(rows(5.01, 7, 1.021))
    assert at["price"] is at["new"] is at["held"] is True
    assert beyond["price"] is beyond["new"] is beyond["held"] is False
    assert at["paper"] is True, "the new pairs are no part of it"


def test_what_is_not_measured_on_every_pair_is_no_goal_met():
    rows = [row("a", AUTO, 1.0), row("b", AUTO, 1.0), row("a", "grasp-paper", 2.0)]
    found = measured(rows)
    assert found["paper"] is None
    assert found["best"] is None
    assert found["held"] is found["new"] is found["answers"] is None
    table = recipes_report.markdown(rows, {}).splitlines()
    assert "| loss below grasp-paper | at least 0.08 | not measured | – |" in table


def test_what_is_recorded_is_missing_no_more(tmp_path):
    table = tmp_path / "xx-yy.parquet"
    wanted = (AUTO, "average", "grasp-paper")
    assert recipes.missing_in(table, FIRST, wanted, (42, 7)) == [
        (AUTO, 42), ("average", 42), ("grasp-paper", 42), (AUTO, 7), ("grasp-paper", 7),
    ]  # fmt: skip
    records.append(table, {"auto-s42": [{}], "average": [{}]}, FIRST)
    assert recipes.missing_in(table, FIRST, wanted, (7, 42)) == [
        (AUTO, 7), ("grasp-paper", 7), ("grasp-paper", 42),
    ]  # fmt: skip
    assert len(recipes.missing_in(table, "adapters-7", wanted, (42,))) == 3


def test_new_pairs_are_run_on_purpose_alone(capsys):
    with pytest.raises(SystemExit):
        recipes.parsed(["run", "en-ar", "en-hi"])
    assert "en-hi is a new pair" in capsys.readouterr().err
    assert recipes.parsed(["run", "--new"]).pairs == list(recipes_report.NEW_PAIRS)
    assert recipes.parsed(["run", "en-hi", "--new", "--seeds", "42,7"]).seeds == [42, 7]
    for pair in recipes_report.NEW_PAIRS:
        config = recorded.config_of(pair)
        assert (config.data.target.language, config.model.name) == (pair[3:], "gemma3-270m")


def test_runs_are_recorded_as_they_finish_and_not_run_again(tmp_path, monkeypatch, capsys):
    tiny_backbone_folder(tmp_path / "base")
    steps = {"epochs": 1, "batch_size": 2}
    evaluate = {"max_new_tokens": 2}
    values = job(tmp_path, recipe=AUTO, train=of_adapters(steps), evaluate=evaluate)
    config = load_config(write_job(tmp_path / "run.yaml", values))
    monkeypatch.setattr(recorded, "config_of", lambda pair: config)
    records_at, table = tmp_path / "kept", tmp_path / "kept" / "xx-yy.parquet"
    command = ["run", "xx-yy", "--work", str(tmp_path / "work"), "--records", str(records_at)]
    command += ["--only", AUTO, "average", "average-finetuned"]
    recipes.main([*command, "--seeds", "42", "--minutes", "-1"])
    assert "xx-yy: 3 runs to do" in capsys.readouterr().out
    assert not (tmp_path / "work").exists()
    recipes.main([*command, "--seeds", "42,7"])
    found = records.read_runs(table, FIRST)
    finetuned = [f"average-finetuned-s{seed}" for seed in (42, 7)]
    assert set(found) == {"auto-s42", "auto-s7", "average", *finetuned}
    assert len({str(one["rows"]["test"]["ids"]) for one in found.values()}) == 1
    assert all(str(tmp_path) not in str(one) for one in found.values()), "a folder of this machine"
    auto, other = found["auto-s42"], found["auto-s7"]
    run = tmp_path / "work" / "xx-yy" / "auto-42-s42"
    assert auto["recipe"] == json.loads((run / "recipe.json").read_text())
    assert auto["recipe"]["tried"][0]["curve"][1] != other["recipe"]["tried"][0]["curve"][1]
    losses = auto["rows"]["test"]["values"]["loss"]
    assert sum(losses) / 4 == pytest.approx(auto["scores"]["test"]["loss"], abs=1e-4)
    assert len(auto["simple_losses"]) == 4
    assert auto["plain_runs"] == auto["recipe"]["price"]["plain_runs"]
    assert min(auto["seconds"], auto["machine"]["cores"]) > 0
    assert auto["versions"]["torch"] == found["average"]["versions"]["torch"]
    # A plain run is the fine-tuned average, which did all of its epochs here.
    rows = {(one["recipe"], one["seed"]): one for one in recipes_report.rows_of(records_at)}
    assert rows["average-finetuned", 7]["plain_runs"] == pytest.approx(1, rel=0.1)
    assert rows["average", 42]["plain_runs"] == 0
    for name in ("run_whole", "compare_methods"):
        monkeypatch.setattr(recipes, name, lambda *a, **_: pytest.fail("run again"))
    recipes.main([*command, "--seeds", "42,7"])
    # A run that was stopped between its end and its record is recorded as it is.
    table.unlink()
    recipes.main([*command[:-3], AUTO, "--seeds", "42"])
    assert records.read_runs(table, FIRST)["auto-s42"]["recipe"] == auto["recipe"]


def test_a_recipe_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    config = SimpleNamespace(seed=42)
    monkeypatch.setattr(recipes, "_settings", lambda *_: config)
    monkeypatch.setattr(recorded, "with_adapters", lambda config, *_: config)
    monkeypatch.setattr(recipes, "sizes_of", lambda *_: None)
    monkeypatch.setattr(recipes, "load_run_data", lambda *_: None)
    monkeypatch.setattr(recipes, "prices_of", lambda *_: SimpleNamespace(plain=100))
    asked = []

    def compared(_config, _queue, only, seeds):
        asked.append((*only, *seeds))
        failed = {"average": "out of memory"} if only == ["average"] else {}
        return {"failed": failed, "not_applicable": {} if failed else {only[0]: "ranks"}}

    monkeypatch.setattr(recipes, "compare_methods", compared)
    monkeypatch.setattr(recipes, "projected", lambda *_: [])
    command = ["run", "xx-yy", "--work", str(tmp_path / "w"), "--records", str(tmp_path / "kept")]
    with pytest.raises(SystemExit, match="xx-yy, average: out of memory"):
        recipes.main([*command, "--only", "average", "svd-finetuned", "--seeds", "42"])
    assert asked == [("average", 42), ("svd-finetuned", 42)]
    kept = records.read_runs(tmp_path / "kept" / "xx-yy.parquet", FIRST)
    assert kept == {"svd-finetuned-s42": {"not_applicable": "ranks"}}


def test_a_replay_tells_what_the_choice_by_held_losses_loses_on_the_test_rows(tmp_path):
    table = tmp_path / "en-xx.parquet"
    for place, name in enumerate(recipes.REPLAYED):
        losses = {"dev": [3.0 + place] * 2, "micro_dev": [3.0]}
        scores = {"test": {"loss": 2.0 - 0.01 * place}}
        record = {"losses": losses, "scores": scores}
        records.append(table, {recipes.job_of(name, 42): [record]})
    assert recipes.replay(table) == pytest.approx({"all": 0.15, "first trials": 0.14})
