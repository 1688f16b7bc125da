"""The laboratory: worlds are what they say, ways cost what they say, figures add up."""

import json
import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmarks import (
    ablation,
    controller,
    controllers,
    landscape,
    landscape_report,
    records,
    replay,
    rewards,
    scopes,
    sizes,
)
from benchmarks import recorded as recorded_runs
from benchmarks.controllers import CONTROLLERS, floor
from benchmarks.worlds import (
    FAMILIES,
    HIGH,
    MICRO_DEV,
    POOL,
    RecordedWorld,
    SyntheticWorld,
    read_recording,
)

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.files import jsonable, write_json, write_jsonl
from grasp_lora.config.run_config import load_config
from grasp_lora.core.controller import rounds
from grasp_lora.core.controller.rounds import ControllerConfig
from grasp_lora.core.evidence.history import (
    compressed,
    curve_minimum,
    observations_by_round,
    records_of,
)
from grasp_lora.plans.compare import compare_methods
from grasp_lora.plans.methods import METHODS, Choice
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, of_adapters, write_job, write_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_a_synthetic_world_sees_its_own_curve(family):
    world = SyntheticWorld(family, 0)
    ratios = np.linspace(0, HIGH, 81)
    assert min(world.regret(r) for r in ratios) == pytest.approx(0, abs=1e-3)
    curve = [np.mean(world.losses(r, range(POOL), 1.0)) for r in ratios]
    on_dev = [world.regret_on_dev(r) for r in ratios]
    assert np.allclose(np.array(curve) - min(curve), on_dev, atol=0.03)
    assert SyntheticWorld(family, 0).losses(0.3, [1, 2], 0.5) == SyntheticWorld(family, 0).losses(
        0.3, [1, 2], 0.5
    )


def test_rows_agree_between_rounds_and_differ_more_at_higher_ratios():
    world = SyntheticWorld("cliff", 1)
    rows = range(POOL)
    at = {r: np.array(world.losses(r, rows, 0.5)) for r in (0.0, 0.2, 0.7)}
    again = np.array(world.losses(0.7, rows, 0.5))
    assert np.corrcoef(at[0.7] - at[0.0], again - at[0.0])[0, 1] > 0.95
    assert (at[0.7] - at[0.0]).std() > 3 * (at[0.2] - at[0.0]).std()


def test_flat_worlds_have_no_effect_and_clear_ones_a_large_one():
    assert SyntheticWorld("flat", 0).effect() == 0
    assert SyntheticWorld("rising", 0).effect() == 0
    effects = [SyntheticWorld("falling", seed).effect() for seed in range(5)]
    assert min(effects) > 3


def keep(table, job, record, collection=records.RUNS):
    """Put a record into a table, in the place of one of the same job."""
    known = records.read(table, collection)
    records.write(table, known | {job: [jsonable(record)]}, collection)


def recorded(table, shift=0.0):
    """Write a recording of 4 ratios, 20 rows and 2 phases whose best final ratio is 0.4."""
    ratios = [0.0, 0.4, 0.6, 0.8]
    rows = np.arange(20) / 100
    losses = {
        str(step): [[1 + abs(r - 0.6 + shift * done) + float(x) for x in rows] for r in ratios]
        for step, done in ((0, 0), (10, 1))
    }
    probes = {"training": "plain", "seed": 42, "steps": 10, "ratios": ratios, "losses": losses}
    ids = [("micro_dev" if i < MICRO_DEV else "dev", f"q{i}") for i in range(20)]
    probes |= {"rows": ids, "shrinks": None}
    keep(records.beside(table, "probes"), "plain-s42", probes)
    finals = {}
    for seed in (42, 1337):
        for ratio in ratios:
            loss = 2 + abs(ratio - 0.4) + (0.1 if seed == 42 else -0.1)
            name = f"grid-{ratio}-s{seed}" if ratio else f"average-finetuned-s{seed}"
            values = {"loss": [loss, loss], "exact_match": [0, 100], "token_f1": [50, 100]}
            final = {
                "job": name,
                "ratio": ratio,
                "zeros": ratio,
                "dev": [(0, loss + 0.5), (5, loss), (10, loss + 0.2)],
                "best": {"step": 5, "loss": loss},
                "rows": {"test": {"values": values}},
            }
            finals[name] = [jsonable(final)]
    records.write(table, finals)
    return table


def test_a_recorded_world_is_the_recording_between_its_points(tmp_path):
    world = RecordedWorld(read_recording(recorded(tmp_path / "pair.parquet", shift=0.2)), 0)
    assert world.pool == 20
    middle = np.array(world.losses(0.5, range(20), 0.5))
    expected = 1 + np.mean([abs(r - 0.6 + s) for r in (0.4, 0.6) for s in (0, 0.2)])
    assert np.mean(middle - np.arange(20) / 100) == pytest.approx(expected, abs=0.02)
    # final: 2 + |r - 0.4|, span 0.4
    assert world.regret(0.4) == 0
    assert world.regret(0.6) == pytest.approx(0.5)
    assert world.exact(range(20)) == 0.4
    assert floor(world, MICRO_DEV) == 0.4


def test_other_seeds_have_other_rows_of_the_same_kind(tmp_path):
    recording = read_recording(recorded(tmp_path / "pair.parquet"))
    first = RecordedWorld(recording, 1).losses(0.4, range(20), 0.0)
    second = RecordedWorld(recording, 2).losses(0.4, range(20), 0.0)
    assert not np.allclose(sorted(first), sorted(second), atol=0.005)
    assert max(first[:MICRO_DEV]) < 1.2 + (MICRO_DEV - 1) / 100 + 0.05, "micro-dev from micro-dev"


def test_a_recording_without_final_runs_is_refused(tmp_path):
    table = recorded(tmp_path / "pair.parquet")
    table.unlink()
    with pytest.raises(FileNotFoundError, match="record the runs first"):
        read_recording(table)
    records.beside(table, "probes").unlink()
    with pytest.raises(FileNotFoundError, match="record the probes first"):
        read_recording(table)


@pytest.mark.parametrize("name", [n for n, way in CONTROLLERS.items() if way.needs is None])
@pytest.mark.parametrize("probes", [24, 51])
def test_every_way_costs_what_it_says_and_is_the_same_again(name, probes):
    way = CONTROLLERS[name]
    found = way.search(SyntheticWorld("quadratic", 3), probes, 5)
    assert 0 <= found.ratio <= HIGH
    rows = 12 if name in ("standard", "standard, unconfirmed", "stratified") else 16
    tried = probes // 8 * 8 if name.startswith("grid") else probes
    baselines = rows * probes // 3 if name == "paper" else 0
    assert found.forwards == tried * rows + baselines
    assert way.search(SyntheticWorld("quadratic", 3), probes, 5) == found


def test_the_optuna_ways_find_a_noiseless_optimum(monkeypatch):
    pytest.importorskip("optuna")

    class Plain:
        pool = POOL

        def losses(self, ratio, rows, done):
            return [(ratio - 0.5) ** 2 for _ in rows]

    for name in ("TPE", "GP"):
        found = CONTROLLERS[name].search(Plain(), 24, 0)
        assert found.ratio == pytest.approx(0.5, abs=0.1)
        assert found.forwards == 24 * 16


def test_the_figures_are_those_of_their_searches():
    rows = [
        {"family": f, "probes": 24, "seed": s, "regret": r, "verdict": v, "forwards": 288}
        | {"effect": e, "covered": True}
        for f, s, r, v, e in [
            ("quadratic", 0, 0.1, "learned", 5.0),
            ("quadratic", 1, 0.3, "flat", 5.0),
            ("cliff", 0, 0.0, "flat", 0.0),
            ("cliff", 1, 0.2, "learned", 0.0),
            ("flat", 0, 0.0, "flat", 0.0),
            ("flat", 1, 0.0, "flat", 0.0),
        ]
    ]
    found = controller.summary(rows, [])
    assert found["regret_24"]["quadratic"] == pytest.approx(0.2)
    assert found["regret_24"]["mean"] == pytest.approx(0.15)
    # seed means 0.05 and 0.25
    assert found["regret_24"]["standard_error"] == pytest.approx(0.1)
    assert found["regret_51"] is None
    assert found["flat_called_flat"] == 1
    assert found["clear_called_flat"] == 0.5
    by_effect = {row["from"]: row for row in found["power"]}
    assert by_effect[4.0] == {"from": 4.0, "to": 6.0, "searches": 2, "learned": 0.5}
    assert by_effect[0.0]["searches"] == 4


def test_the_laboratory_writes_and_draws_its_figures(tmp_path, capsys, drawing):
    table = recorded(tmp_path / "pair.parquet")
    out, picture = tmp_path / "found.json", tmp_path / "found.png"
    names = ["paper", "standard", "grid"]
    controller.main(
        [
            "--quick",
            "--jobs",
            "1",
            "--only",
            *names,
            "--recordings",
            str(table),
            "--json",
            str(out),
        ]
        + ["--picture", str(picture)]
    )
    found = json.loads(out.read_text())
    assert found["default"] == "standard"
    assert list(found["controllers"]) == names
    for one in found["controllers"].values():
        assert math.isfinite(one["regret_24"]["mean"])
        assert math.isfinite(one["regret_24"]["pair"])
    assert (
        found["floor"]["all"]["regret_24"]["mean"] <= found["floor"]["fixed"]["regret_24"]["mean"]
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "| standard | 288 |" in capsys.readouterr().out


def test_ways_are_added_to_the_figures_of_others(tmp_path):
    out, whole = tmp_path / "found.json", tmp_path / "whole.json"
    quick = ["--quick", "--jobs", "1", "--json"]
    controller.main([*quick, str(whole), "--only", "grid", "grid, fixed rows"])
    controller.main([*quick, str(out), "--only", "grid, fixed rows"])
    controller.main([*quick, str(out), "--add", "--only", "grid"])
    found, wanted = (json.loads(file.read_text()) for file in (out, whole))
    assert found["controllers"] == wanted["controllers"]
    assert found["rows"] == wanted["rows"]
    with pytest.raises(SystemExit, match="was made with quick True, not False"):
        controller.main(["--json", str(out), "--add", "--only", "grid"])
    with pytest.raises(SystemExit, match="--add needs the file"):
        controller.main([*quick, str(tmp_path / "none.json"), "--add", "--only", "grid"])


def test_a_way_whose_package_is_missing_is_named_and_left_out(monkeypatch, capsys):
    monkeypatch.setattr(controllers.importlib.util, "find_spec", lambda name: None)
    assert "TPE" not in controllers.available()
    assert "left out: TPE, which needs optuna" in capsys.readouterr().out


def test_the_report_of_recordings_ranks_probes_against_final_runs(tmp_path, capsys, drawing):
    table = recorded(tmp_path / "pair.parquet")
    found = records.read_runs(table)["grid-0.6-s42"] | {"verdict": "flat", "ratio": 0.5}
    for seed in (42, 7):  # nothing else has seed 7
        job = f"grasp-restart-s{seed}"
        keep(table, job, found | {"job": job})
    # a run at the ratio that another one found is no point of the grid
    beside = found | {"job": "ratio-lower-s42", "ratio": 0.55}
    keep(table, "ratio-lower-s42", beside)
    picture = tmp_path / "landscape.png"
    begun = tmp_path / "begun.parquet"
    records.write(begun, {})
    landscape_report.main([str(table), str(begun), "--picture", str(picture)])
    text = capsys.readouterr().out
    # probes are lowest at 0.6, finals at 0.4: regret 0.2 of a span of 0.4
    assert "| plain, seed 42 | 10 |" in text
    assert "| 0.6 | 0.500 |" in text
    assert (
        "| 0.4 | 0.40 | 2 | 1, 1 | 2.000 | 2.200 | 2.000 | -0.400 ± 0.000 | 50.0 | 75.0 |" in text
    )
    # The run is like that at 0.6, dev rows choose 0.4: 0.2 nats worse, of a span of 0.4; the
    # ratio itself is halfway between the two.
    numbers = "0.500 | 42 | 0.4 | 2.300 | 2.100 | 2.300 | 2.100 | 0.400 | +0.250 | +0.500"
    assert f"| grasp-restart | 42 | flat | {numbers} |" in text
    # Seed 7 has no grid of its own: it is held against that of the first with most points.
    numbers = "0.500 | 1337 | 0.4 | 2.300 | 1.900 | 2.300 | 1.900 | 0.400 | +0.250 | +1.000"
    assert f"| grasp-restart | 7 | flat | {numbers} |" in text
    assert "0.55" not in text
    assert "ratio-lower" not in text
    assert "begun: no final runs yet" in text
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def landscape_of_a_tiny_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("landscape")
    tiny_backbone_folder(folder / "base")
    file = write_job(folder / "run.yaml", job(folder, controller={"rounds": 1, "rows": 2}))
    names = ["plain", "random"]
    out = folder / "out.parquet"
    arguments = [str(file), "--out", str(out), "--work", str(folder / "work")]
    arguments += ["--seeds", "42", "--only", *names]
    landscape.main(arguments)
    return out, arguments


def test_a_landscape_holds_every_row_at_every_ratio_and_phase(landscape_of_a_tiny_model):
    out, _ = landscape_of_a_tiny_model
    plain, random = (records.read_runs(out)[f"{name}-s42"] for name in ("plain", "random"))
    for one in (plain, random):
        assert list(one["losses"]) == ["0", "2", "4"] or len(one["losses"]) == 3
        for curve in one["losses"].values():
            assert np.array(curve).shape == (9, 8)
    first = [one["losses"]["0"] for one in (plain, random)]
    assert first[0] == first[1], "both start from the same merge"
    last = [list(one["losses"].values())[-1] for one in (plain, random)]
    assert last[0] != last[1]
    assert np.allclose(plain["shrinks"]["losses"][0], plain["losses"]["0"][0], atol=2e-4)


def test_scopes_are_held_against_one_ratio_on_rows_that_chose_nothing(tmp_path, capsys):
    tiny_backbone_folder(tmp_path / "base")
    rows = {"train": 4, "dev": 18, "micro_dev": 4}
    adapters = {
        name: str(tiny_adapter_folder(tmp_path / name, tiny_model(), r=r, seed=r))
        for name, r in (("source", 4), ("target", 2))
    }
    config = job(tmp_path, controller={"rounds": 1, "rows": 2}, adapters=adapters)
    config["data"]["target"]["rows"] = rows
    file = write_job(tmp_path / "run.yaml", config)
    out = tmp_path / "scopes.json"
    scopes.main([str(file), "--work", str(tmp_path), "--json", str(out), "--ratios", "0.5"])
    found = json.loads(out.read_text())["ratios"]["0.5"]
    assert list(found) == [
        *("one ratio", "drawn at random", "by module-type", "by layer", "by adapter"),
        "whole components",
    ]
    assert {len(one["losses"]) for one in found.values()} == {22 - 16}
    whole = [statistics.fmean(one["losses"]) for one in found.values()]
    for mean, (name, one) in list(zip(whole, found.items(), strict=True))[1:]:
        spread = one.get("ratios", {"none": None}).values()
        alike = all(ratio == pytest.approx(0.5) for ratio in spread)
        assert (mean == pytest.approx(whole[0], abs=1e-6)) == alike, name
    assert len(set(whole)) >= 5
    first, second = found["by adapter"]["ratios"].values()
    assert (4 * first + 2 * second) / 6 == pytest.approx(0.5, abs=1e-6), "ranks 4 and 2"
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"| one ratio | {whole[0]:.3f} |"
    assert f"| drawn at random | {whole[1] - whole[0]:+.3f} ± " in lines[3]


def test_sizes_are_held_against_the_adapter_on_rows_that_chose_and_on_test_rows(tmp_path, capsys):
    tiny_backbone_folder(tmp_path / "base")
    adapter = tiny_adapter_folder(tmp_path / "adapter", tiny_model(), r=4)
    config = job(tmp_path, adapters={"source": str(adapter)})
    file, out = write_job(tmp_path / "run.yaml", config), tmp_path / "sizes.json"
    options = ["--work", str(tmp_path), "--json", str(out), "--adapter", str(adapter)]
    sizes.main([str(file), *options, "--rows", "6", "--tests", "3"])
    found = json.loads(out.read_text())["ways"]
    whole = 2 * 2 * 4 * ((16 + 16) + (16 + 8))
    assert found["as it is"]["bytes"] == found["r bf16"]["bytes"] == whole
    assert found["r/2 bf16"]["bytes"] == whole // 2
    assert found["drop"]["bytes"] == 0
    pruned = found["prune 0.6"]
    assert pruned["bytes"] == whole, "a file with zeros is as large"
    assert pruned["sparse_bytes"] == round(0.4 * whole + whole / 2 / 8)
    for share in (2, 4, 8):
        assert 0 < found[f"budget 1/{share}"]["bytes"] <= whole / share
    assert {len(one["chose"]["losses"]) for one in found.values()} == {6}
    assert {len(one["test"]["losses"]) for one in found.values()} == {3}
    base = found["as it is"]["test"]["losses"]
    gaps = [a - b for a, b in zip(pruned["test"]["losses"], base, strict=True)]
    assert pruned["test"]["added"] == pytest.approx(statistics.fmean(gaps))
    lines = capsys.readouterr().out.splitlines()
    assert f"| drop | 0.000 | {found['drop']['chose']['added']:+.3f} ± " in "\n".join(lines)


def test_kept_runs_are_put_back_and_not_run_again(tmp_path, capsys):
    queue = tmp_path / "queue"
    result = {"scores": {"test": {"loss": 1.0}}, "ratio": 0.2, "adapter": str(tmp_path)}
    rows = {"test": {"ids": ["q"], "values": {"loss": [1.0]}}}
    twice = {"test": {"ids": ["q"], "values": {"loss": [1.0], "perplexity": [2.71828]}}}
    own = result | {"rows": twice}
    record = {"key": "k", "seconds": 3.0, "peak_memory_bytes": 7, "machine": {"cpu": "c"}}
    record["provenance"] = {"packages": {"torch": "another machine's"}, "python": "3"}
    write_json(queue / "grid-0.2-s42" / "result.json", record | {"result": own})
    write_json(queue / "adapters" / "result.json", record | {"result": {"merged": "m"}})
    table = tmp_path / "kept" / "en-es.parquet"
    recorded_runs.main(["keep", str(queue), str(table)])
    assert list(table.parent.iterdir()) == [table]
    (kept,) = records.read_runs(table).values()
    assert str(tmp_path) not in str(kept), "a folder of this machine"
    assert kept["versions"] == {"torch": "another machine's", "python": "3"}
    assert "1 runs written" in capsys.readouterr().out
    assert recorded_runs.keep(queue, table) == 0
    assert recorded_runs.restore(table, tmp_path / "again") == 1
    assert recorded_runs.keep(queue, table, "repeats") == 1, "another collection has its own runs"
    back = json.loads((tmp_path / "again" / "grid-0.2-s42" / "result.json").read_text())
    assert back["key"] == "k"
    assert back["result"] == result | {"rows": rows, "adapter": None}
    assert back["machine"] == {"cpu": "c"}


def kept_run(table, job, ratio, loss, test_loss, collection=records.RUNS, **changes):
    """A recorded run whose four labelled rows and two test rows have these losses."""
    values = {"loss": [test_loss - 0.1, test_loss + 0.1], "exact_match": [0.0, 100.0]}
    price = {"runs": 1, "seconds": 10.0, "forwards": 5, "steps": 6, "tokens": 7}
    record = {
        "job": job, "ratio": ratio, "price": price, "bytes": 9, "zeros": ratio, "key": job,
        "losses": {"micro_dev": [loss] * 2, "dev": [loss + (ratio == 0.2)] * 2},
        "scores": {"test": {"exact_match": 50.0, "loss": test_loss}},
        "intervals": {"test": {"exact_match": [40.0, 60.0], "loss": [1.0, 3.0]}},
        "rows": {"test": {"ids": ["a", "b"], "groups": ["g", "h"], "values": values}},
        "best": {"step": 3, "loss": loss}, "dev": [[0, 2.0], [3, loss]], "dtype": "float32",
        "machine": {"cpu": "c"}, "seconds": 11.0, "peak_memory_bytes": int(100 * (ratio or 0)),
    }  # fmt: skip
    keep(table, job, record | changes, collection)


def test_differences_to_any_recorded_method_are_printed(tmp_path, capsys):
    kept_run(tmp_path / "en-es.parquet", "grid-0.2-s42", 0.2, 1.0, 2.0)
    kept_run(tmp_path / "en-es.parquet", "grid-0.5-s42", 0.5, 1.0, 2.25)
    recorded_runs.main(["against", "grid-0.2", "grid-0.5", "--records", str(tmp_path)])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("en-es: grid-0.5 against grid-0.2: exact_match +0.000")
    assert "loss +0.250 [+0.250, +0.250]" in line
    kept_run(tmp_path / "en-es.parquet", "grid-0.2-s42", 0.2, 1.0, 1.5, "else")
    kept_run(tmp_path / "en-ar.parquet", "grid-0.2-s42", 0.2, 1.0, 1.5, "else")
    elsewhere = ["--records", str(tmp_path), "--methods-in", "else"]
    recorded_runs.main(["against", "grid-0.2", "grid-0.2", *elsewhere])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("en-es: grid-0.2 in else against grid-0.2: exact_match +0.000")
    assert "loss -0.500 [-0.500, -0.500]" in line


def test_a_relative_stands_beside_what_it_is_a_change_of(tmp_path, capsys):
    def kept(job: str, ratio: float | None, loss: float, f1: float) -> None:
        values = {"loss": [loss - 0.1, loss + 0.1], "token_f1": [f1 - 2, f1 + 2]}
        rows = {"test": {"ids": ["a", "b"], "groups": ["g", "h"], "values": values}}
        scores = {"test": {"token_f1": f1, "loss": loss}}
        table = tmp_path / "en-es.parquet"
        kept_run(table, job, ratio, 1.0, loss, recorded_runs.RELATIVES, scores=scores, rows=rows)

    kept("grid-0.4-s42", 0.4, 2.0, 30.0)
    kept("grid-0.4-s1337", 0.4, 2.5, 34.0)
    kept("obs-0.4-s42", 0.4, 1.75, 33.0)
    kept("2-of-4-s42", 0.5, 2.25, 20.0)
    kept("layer-swap", None, 3.0, 10.0)
    recorded_runs.main(["relatives", "--records", str(tmp_path)])
    title, _, _, _, *lines = capsys.readouterr().out.strip().splitlines()
    assert title == "### en-es"
    gaps = "-0.250 [-0.250, -0.250] | 33.0 | +3.0 [+3.0, +3.0]"
    assert lines == [
        "| `grid-0.4` | 2 | 0.40 | 2.250 | `average-finetuned` | – | 32.0 | – | 10 |",
        f"| `obs-0.4` | 1 | 0.40 | 1.750 | `grid-0.4` | {gaps} | 10 |",
        "| `2-of-4` | 1 | 0.50 | 2.250 | `grid-0.5` | – | 20.0 | – | 10 |",
        "| `layer-swap` | 1 | 0.00 | 3.000 | `average-finetuned` | – | 10.0 | – | 10 |",
    ]


def test_the_page_of_relatives_has_the_tables_of_their_records(capsys):
    page = (recorded_runs.records.FOLDER.parent / "relatives.md").read_text("utf-8")
    recorded_runs.main(["relatives"])
    assert page.split("recorded relatives -->\n\n")[1].strip() == capsys.readouterr().out.strip()


def test_means_are_over_the_seeds_of_a_pair(tmp_path, capsys):
    for seed, loss in ((42, 2.0), (1337, 2.5)):
        kept_run(tmp_path / "en-es.parquet", f"average-finetuned-s{seed}", 0.0, 1.0, loss)
    kept_run(tmp_path / "en-ar.parquet", "source-finetuned-s42", 0.0, 1.0, 3.0)
    keep(tmp_path / "en-ar.parquet", "ties-finetuned-s42", {"not_applicable": "ranks"})
    kept_run(tmp_path / "en-zh.parquet", "zero-shot", 0.0, 1.0, 3.0)
    methods = ["average-finetuned", "source-finetuned"]
    recorded_runs.main(["means", *methods, "--records", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| en-ar | – | 3.000 (1) |",
        "| en-es | 2.250 (2) | – |",
    ]
    arguments = ["means", *methods, "--metric", "exact_match", "--records", str(tmp_path)]
    recorded_runs.main(arguments)
    assert "| en-es | 50.0 (2) | – |" in capsys.readouterr().out
    recorded_runs.main(["means", *methods, "--seeds", "1337", "--records", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:] == ["| en-es | 2.500 (1) | – |"]


def test_speed_is_told_of_runs_of_one_machine_and_version_alone(tmp_path, capsys):
    def kept(job: str, seconds: float, **changes) -> None:
        kept_run(tmp_path / "en-es.parquet", job, 0.2, 1.0, 2.0)
        record = records.read_runs(tmp_path / "en-es.parquet")[job]
        record["price"] |= {"seconds": seconds, "tokens": 100}
        record |= {"versions": {"python": "3.11"}} | changes
        keep(tmp_path / "en-es.parquet", job, record)

    for seed in (42, 1337, 9001):
        for tenths in range(1, 9 if seed != 9001 else 8):
            kept(f"grid-0.{tenths}-s{seed}", 10.0)
        kept(f"grasp-restart-s{seed}", 32.0)
        kept(f"grasp-continue-s{seed}", 16.0)
    kept("grid-0.3-s1337", 10.0, machine={"cpu": "another"})
    kept("grasp-continue-s42", 16.0, versions={"python": "3.12"})
    recorded_runs.main(["speed", "grasp-restart", "grasp-continue", "--records", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| en-es | 42 | c | grasp-restart | 32 | 80 | 2.5 | 8.0 |"
    ]


def test_what_late_merges_chose_is_printed_seed_by_seed(tmp_path, capsys):
    late = {"weights": [0.625, 0.375], "verdict": "flat"}
    for seed in (42, 9001):
        kept_run(tmp_path / "en-es.parquet", f"late-merge-s{seed}", 0.0, 1.0, 2.0, **late)
    kept_run(tmp_path / "en-es.parquet", "grasp-late-s42", 0.3, 1.0, 1.75, **late)
    recorded_runs.main(["late", "--records", str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| en-es | 42 | 0.375 | 2.000 | 0.30 | flat | -0.2500 ± 0.0000 | +0 |",
        "| en-es | 9001 | 0.375 | 2.000 | – | – | – | – |",
    ]


def test_tables_are_made_of_what_is_recorded(tmp_path):
    runs, out = tmp_path / "runs", tmp_path / "out"
    pair = runs / "en-es.parquet"
    # On micro-dev 0.2 is best, on micro-dev and dev together 0.5 is.
    for ratio in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        loss = {0.2: 1.0, 0.5: 1.1}.get(ratio, 1.5)
        kept_run(pair, f"grid-{ratio}-s42", ratio, loss, 2 + ratio)
    kept_run(pair, "average-finetuned-s42", 0.0, 1.4, 2.0)
    kept_run(pair, "grasp-restart-s42", 0.33, 1.2, 2.1)
    keep(pair, "ties-finetuned-s42", {"not_applicable": "ranks differ"})
    out.mkdir()
    (out / "comparison.md").write_text(f"mine\n{recorded_runs.TABLES_BELOW}\nold tables\n")
    recorded_runs.main(["tables", "--records", str(runs), "--out", str(out)])
    found = recorded_runs.compared(pair)
    rows = found["rows"]
    by_method = {row["method"]: row for row in rows}
    assert by_method["grid"]["ratio"] == 0.5
    assert by_method["grid-few-rows"]["ratio"] == 0.2
    assert by_method["grid"]["seconds"] == 80.0
    assert by_method["grid"]["peak_memory_bytes"] == 80
    assert by_method["ratio-nearest"]["ratio"] == 0.3
    assert by_method["ratio-nearest"]["seconds"] == 10.0
    assert by_method["grid"]["intervals"]["test"]["loss"] == [1.0, 3.0]
    wanted = {
        *("method", "seed", "ratio", "scores", "seconds", "forwards", "tokens"),
        *("peak_memory_bytes", "machine"),
    }
    assert all(wanted <= row.keys() for row in rows)
    assert found["task"] == "qa"
    text = (out / "comparison.md").read_text()
    assert text.startswith("mine\n")
    assert "old tables" not in text
    assert "| grid | 1 | 0.500 |" in text
    assert "`ties-finetuned`: ranks differ" in text
    assert (out / "comparison" / "en-es" / "pareto.png").exists()


def test_headlines_without_a_letter_of_their_reference_stand_for_empty_ones(tmp_path, monkeypatch):
    def empty(task: str, **changes) -> dict[str, int] | None:
        config = SimpleNamespace(data=SimpleNamespace(task=task))
        monkeypatch.setattr(recorded_runs, "config_of", lambda pair: config)
        table, run = tmp_path / "en-es.parquet", "average-finetuned-s42"
        kept_run(table, run, 0.0, 1.4, 2.0)
        record = records.read_runs(table)[run]
        record["rows"]["test"]["values"]["chrf"] = [0.0, 3.0]
        keep(table, run, record | changes)
        (found,) = recorded_runs.outcomes_in(table).values()
        return found.result.get("empty")

    assert empty("summarization") == {"test": 1}
    assert empty("summarization", empty={"test": 0}) == {"test": 0}
    assert empty("qa") is None


def test_scores_beside_empty_answers_are_printed(tmp_path, capsys):
    runs = tmp_path / "runs"
    for seed, loss, score, count in (
        (42, 2.0, 55.0, 1),
        (1337, 3.0, 40.0, 0),
        (9001, 2.5, 60.0, 0),
    ):
        scores = {"test": {"exact_match": score, "loss": loss}}
        changes = {"scores": scores, "empty": {"test": count}}
        name = f"average-finetuned-s{seed}"
        kept_run(runs / "en-es.parquet", name, 0.0, 1.4, loss, **changes)
    kept_run(runs / "en-es.parquet", "source-finetuned-s42", 0.0, 1.4, 2.0)
    recorded_runs.main(["empty", "--metric", "exact_match", "--records", str(runs)])
    assert capsys.readouterr().out.splitlines()[2:] == [
        # Of the two answers of the first run one is empty, so the other has all of its score.
        "| en-es | average-finetuned | 3 | 17 | 51.7 | 70.0 | 2.500 |",
        "en-es: 3 runs, exact_match with empty +0.28, with loss -0.72",
    ]


def test_the_plan_has_every_method_that_trains_or_scores_once_for_each_seed():
    planned = recorded_runs.planned()
    assert len(set(planned)) == len(planned)
    assert {name for name, _ in planned} == {
        name for name, method in METHODS.items() if not isinstance(method.build, Choice)
    }
    for name in {name for name, _ in planned}:
        seeds = {seed for method, seed in planned if method == name}
        assert seeds == {42, 1337, 9001} if METHODS[name].seeds == "all" else 42 in seeds, name
    assert planned[0] == ("average-finetuned", 42)


def test_the_relatives_have_a_plan_of_their_own_that_begins_with_what_they_are_held_against():
    planned = recorded_runs.planned("relatives")
    assert len(set(planned)) == len(planned)
    assert {name for name, _ in planned} <= {name for name, _ in recorded_runs.planned()}
    assert [name for name, _ in planned[:2]] == ["average-finetuned", "grid-0.4"]
    assert [seed for _, seed in planned] == sorted(
        (s for _, s in planned), key=(42, 1337, 9001).index
    )


def test_a_pair_without_settings_is_named():
    with pytest.raises(ValueError, match="0 files are named results/xx-yy"):
        recorded_runs.config_of("xx-yy")


@pytest.fixture
def in_this_process(monkeypatch):
    """Do the runs of a comparison here: a process each would only import all again."""

    def compared(config, out, methods, seeds, *_pool):
        return compare_methods(config, out, methods, seeds)

    monkeypatch.setattr(recorded_runs, "compare_methods", compared)


def test_what_is_planned_is_run_kept_and_not_run_again(tmp_path, monkeypatch, in_this_process):
    tiny_backbone_folder(tmp_path / "base")
    steps = {"epochs": 1, "batch_size": 2}
    config = load_config(write_job(tmp_path / "run.yaml", job(tmp_path, train=of_adapters(steps))))
    monkeypatch.setattr(recorded_runs, "config_of", lambda pair: config)
    places = ["--work", str(tmp_path / "work"), "--records", str(tmp_path / "kept")]
    command = ["run", "xx-yy", *places, "--only", "zero-shot", "target"]
    recorded_runs.main(command)
    kept = records.read_runs(tmp_path / "kept" / "xx-yy.parquet")
    assert set(kept) == {"zero-shot", "target"}
    for record in kept.values():
        assert str(tmp_path) not in str(record), "a folder of this machine"
        assert record["machine"]["cores"] > 0
    monkeypatch.setattr(recorded_runs, "compare_methods", lambda *a: pytest.fail("run again"))
    recorded_runs.main(command)
    recorded_runs.main([*command[:6], "--only", "source", "--minutes", "0"])  # no time is left


def test_adapters_of_another_seed_are_of_the_same_rows_and_kept_elsewhere(
    tmp_path, monkeypatch, in_this_process
):
    tiny_backbone_folder(tmp_path / "base")
    steps = {"epochs": 1, "batch_size": 2}
    config = load_config(write_job(tmp_path / "run.yaml", job(tmp_path, train=of_adapters(steps))))
    monkeypatch.setattr(recorded_runs, "config_of", lambda pair: config)
    places = ["--work", str(tmp_path / "work"), "--records", str(tmp_path / "kept")]
    command = ["run", "xx-yy", *places, "--only", "target"]
    recorded_runs.main([*command, "--seeds", "1337"])  # drawn with no seed: counts as the first
    assert not (tmp_path / "kept").exists()
    for more in ((), ("--adapters-seed", "7")):
        recorded_runs.main([*command, "--seeds", "42", *more])
    first, other = (
        records.read_runs(tmp_path / "kept" / "xx-yy.parquet", collection)["target"]
        for collection in ("runs", "other-adapters")
    )
    assert first["rows"]["test"]["ids"] == other["rows"]["test"]["ids"]
    assert first["dev"] != other["dev"]
    folders = [place.name for place in (tmp_path / "work").iterdir() if place.name != "xx-yy"]
    assert len(folders) == 4, "two adapters of each seed"


def test_a_reference_task_moves_the_source_adapter_by_what_two_languages_differ_in(
    tmp_path, monkeypatch, in_this_process
):
    tiny_backbone_folder(tmp_path / "base")
    steps = {"epochs": 1, "batch_size": 2, "learning_rate": 0.1}
    own = load_config(write_job(tmp_path / "run.yaml", job(tmp_path, train=of_adapters(steps))))
    monkeypatch.setattr(recorded_runs, "config_of", lambda pair: own)
    target = {"language": "fr", "files": "-", "rows": {"train": 6, "dev": 2, "micro_dev": 4}}
    values = job(tmp_path, train=of_adapters(steps), data={"max_length": 640, "target": target})
    monkeypatch.setattr(recorded_runs, "REFERENCE", write_job(tmp_path / "ref.yaml", values))
    for language in ("en", "es"):  # the same ids in both, as translations have
        write_rows(tmp_path / f"{language}.jsonl", range(12)).rename(tmp_path / f"{language}-x")
        text = (tmp_path / f"{language}-x").read_text().replace("house", f"house {language}")
        (tmp_path / f"{language}.jsonl").write_text(text)
    monkeypatch.setattr(recorded_runs, "REFERENCE_FILES", str(tmp_path / "{}.jsonl"))
    work, kept = tmp_path / "work", tmp_path / "kept"
    command = ["run", "xx-yy", "--work", str(work), "--records", str(kept), "--only", "source"]
    recorded_runs.main([*command, "--collection", "reference-task"])
    (record,) = records.read_runs(kept / "xx-yy.parquet", "reference-task").values()
    assert record["job"] == "source"
    places = ("source-base-*", "reference-es-base", "reference-en-base", "source-xx-yy-base-moved")
    source, added, taken, moved = (
        {name: one.delta() for name, one in read_adapter(folder).adapter.items()}
        for (folder,) in (list(work.glob(place)) for place in places)
    )
    assert max((added[name] - taken[name]).abs().max() for name in source) > 1e-3
    for name, delta in moved.items():
        expected = source[name] + added[name] - taken[name]
        torch.testing.assert_close(delta, expected, rtol=1e-4, atol=1e-6)
    # The table holds it against the source adapter as it was.
    recorded_runs.main([*command, "--collection", "relatives"])
    lines = recorded_runs.relatives(kept, "relatives")
    (beside,) = (line for line in lines if line.startswith("| `reference-task, source` "))
    plain = records.read_runs(kept / "xx-yy.parquet", "relatives")["source"]
    gap = record["scores"]["test"]["loss"] - plain["scores"]["test"]["loss"]
    assert f"| `source` | {gap:+.3f} |" in beside


def test_what_is_recorded_is_not_run_again(landscape_of_a_tiny_model, monkeypatch):
    _, arguments = landscape_of_a_tiny_model
    monkeypatch.setattr(landscape, "probe_run", lambda *a: pytest.fail("run again"))
    landscape.main(arguments)


def test_rewards_are_judged_by_the_rows_that_were_not_drawn():
    generator = np.random.default_rng(1)
    clear = np.linspace(2.0, 1.0, 9)[:, None] + 0.01 * generator.standard_normal((9, 40))
    coarse = 100.0 * (generator.random((9, 40)) < 0.05)
    values = {"loss": clear, "token_f1": 100 * (2 - clear), "exact_match": coarse}
    found = rewards.judged(values, 12, draws=300)
    assert found["loss"]["tied"] == 0
    assert found["loss"]["right"] > 0.99
    assert found["loss"]["lost_loss"] < 1e-3
    assert found["loss"]["lost_f1"] < 0.1
    # with one hit in twenty rows a mean over 12 is mostly 0 or 1/12, and tells nothing
    assert found["exact_match"]["tied"] > 0.3
    assert 0.4 < found["exact_match"]["right"] < 0.6
    assert found["exact_match"]["lost_loss"] > 0.2


def test_rewards_are_recorded_for_every_row_and_ratio(tmp_path, capsys):
    tiny_backbone_folder(tmp_path / "base")
    adapter = tiny_adapter_folder(tmp_path / "adapter", tiny_model(), r=2, seed=1)
    file = write_job(tmp_path / "run.yaml", job(tmp_path))
    out = tmp_path / "rewards.json"
    rewards.main([str(file), "--adapter", str(adapter), "--rows", "4", "--json", str(out)])
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    for name in ("loss", "exact_match", "token_f1", "chrf", "rougeL"):
        assert np.array(found["values"][name]).shape == (9, 8)
    assert len(set(np.array(found["values"]["loss"]).mean(1))) == 9
    rewards.main(["--from", str(out), "--rows", "4"])
    table = capsys.readouterr().out
    assert "| reward, 4 rows | tied |" in table
    assert printed.endswith(table)


def test_an_ablation_holds_each_variant_beside_the_preset(tmp_path, capsys):
    out = tmp_path / "ablation.json"
    only = ["--only", "entropy-on", "rows-4"]
    ablation.main(["--preset", "standard", "--quick", *only, "--json", str(out)])
    found = json.loads(out.read_text())["variants"]
    assert list(found) == ["as-configured", "entropy-on", "rows-4"]
    assert found["as-configured"]["difference"] == 0.0
    assert found["rows-4"]["forwards"] == found["as-configured"]["forwards"] / 3
    worlds = [SyntheticWorld("flat", seed) for seed in (30000, 30001)]
    config = ablation.variants_of("standard")["rows-4"]
    ends = [
        controllers.searched(world, config, 30000 + i)[0].mask_ratio
        for i, world in enumerate(worlds)
    ]
    assert found["rows-4"]["in_force"]["flat"] == pytest.approx(sum(ends) / 2)
    assert found["entropy-on"]["sigma"] > found["as-configured"]["sigma"]
    assert capsys.readouterr().out.count("\n| ") == 3


def test_variants_that_need_a_model_are_no_part_of_the_laboratory():
    for preset in ("paper", "standard"):
        found = ablation.variants_of(preset)
        assert not {"moments-kept", "moments-cleared"} & set(found)
        base = found["as-configured"]
        assert all(config != base for name, config in found.items() if name != "as-configured")
    assert ablation.variants_of("paper")["anchor-and-entropy-off"].entropy == 0.0


def test_the_published_commit_masks_at_the_candidate_and_records_another_ratio():
    config = ControllerConfig(preset="paper")
    losses = [[1.0] * 4, [3.0] * 4]
    state = rounds.begin(config)
    round_of = (config, (0.8, 0.4), [2.0] * 4, losses, [3, 1, 4, 5], 10)
    after, record = controllers.conclude_at_candidate(state, *round_of)
    assert (record.ratio, record.mask_ratio) == (pytest.approx(0.5), 0.8)
    assert (after.mask_ratio, after.records) == (0.8, (record,))
    _, ours = rounds.conclude(state, *round_of)
    assert ours.mask_ratio == ours.ratio == record.ratio
    few = ControllerConfig(preset="paper", rounds=20)
    ours, theirs = (
        ablation.one_search(few, "quadratic", 4, conclude)
        for conclude in (rounds.conclude, controllers.conclude_at_candidate)
    )
    assert ours["forwards"] == theirs["forwards"]
    assert ours["in_force"] != theirs["in_force"]
    assert ablation.parsed(["--only", ablation.AT_CANDIDATE]).only == [ablation.AT_CANDIDATE]


EMBEDDED = records.FOLDER / "embedded.parquet"


def test_a_recorded_search_is_replayed_to_the_ratio_it_ended_with(capsys):
    table = records.beside(EMBEDDED, "rounds")
    names = sorted(records.jobs(table, "former"))
    assert len(names) == 2
    replay.main([str(table), "--collection", "former"])
    ends = [line for line in capsys.readouterr().out.splitlines() if "as it is" in line]
    runs = records.read_runs(EMBEDDED, "former")
    kept = [runs[name]["ratio"] for name in names]
    assert [float(line.split("|")[2]) for line in ends] == pytest.approx(kept)


def test_replay_prints_where_the_curve_of_a_recorded_search_is_lowest(tmp_path, capsys):
    table = records.beside(EMBEDDED, "rounds")
    searches = records.read(table, "former")
    (name, *_) = sorted(searches)
    replay.main([str(table), "--collection", "former", "--jobs", name])
    printed = capsys.readouterr().out
    rows = [line.split("|") for line in printed.splitlines() if " x median" in line]
    rounds = records_of(searches[name])[0]
    expected = [
        curve_minimum(
            compressed(observations_by_round(rounds), multiple), len(rounds), ControllerConfig()
        )
        for multiple in (1, 2, 4)
    ]
    assert [float(row[2]) for row in rows] == pytest.approx(expected, abs=5e-4)
    write_jsonl(tmp_path / f"{name}.jsonl", searches[name])
    replay.main([str(tmp_path / f"{name}.jsonl")])
    assert capsys.readouterr().out == printed, "a run's own rounds.jsonl"
