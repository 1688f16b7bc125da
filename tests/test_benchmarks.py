"""Every benchmark's quick path on a tiny random model: its figures are there and are numbers."""

import functools
import importlib
import json
import math

import gguf
import pytest
import torch
from benchmarks import (
    budget,
    common,
    describing,
    done,
    end_to_end,
    engines,
    evaluation,
    generate,
    growth,
    importance,
    leaks,
    loading,
    masks,
    processes,
    revival,
    search,
    sharing,
    step,
)
from benchmarks.authors_schedule import Schedule

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.clock import Clock
from grasp_lora.sharing.gguf_files import layout_of
from helpers import drawing, tiny_backbone_folder, tiny_model

FIGURES = {
    generate: ("generate_speedup",),
    evaluation: ("evaluation_ratio",),
    search: ("memory_ratio", "plain_seconds"),
    end_to_end: (
        "speedup_vs_grid_restart",
        "speedup_vs_grid_continue",
        "speedup_vs_authors_schedule",
        "speedup_vs_authors_schedule_continue",
    ),
    engines: ("bfloat16_share",),
    growth: (),
    importance: ("obs_error",),
    loading: ("help_seconds",),
    masks: ("masks_1b_fraction", "masks_1b_extra_memory"),
    processes: ("probe_efficiency", "round_efficiency"),
    revival: ("revival_largest",),
    sharing: ("sharing_speedup",),
    step: ("step_matmul_fraction", "step_speedup_vs_trainer", "probe_over_forward"),
}


def here(function_name: str, args: dict) -> common.Isolated:
    """Do in this process what `common.isolated` starts another for, seconds of imports each."""
    module, _, function = function_name.partition(":")
    value = getattr(importlib.import_module(module), function)(**args)
    return common.Isolated(value, None)


@pytest.fixture(scope="module")
def result_of(tmp_path_factory):
    """Return a function that gives a benchmark's result, run once."""
    folder = tmp_path_factory.mktemp("benchmarks")
    model = tiny_backbone_folder(folder / "base")
    shared = ["--quick", "--model", str(model), "--dtype", "float32", "--device", "cpu"]

    @functools.cache
    def result(benchmark) -> dict:
        path = folder / f"{benchmark.__name__}.json"
        more = ["--picture", str(folder / "growth.png")] if benchmark is growth else []
        with drawing(), pytest.MonkeyPatch.context() as patch:
            small = functools.partial(common.matmul_rate, size=256)
            patch.setattr(common, "matmul_rate", small)
            if benchmark is loading:  # what a process of its own is, masks and search show
                patch.setattr(common, "isolated", here)
            benchmark.main([*shared, "--json", str(path), *more])
        text = path.read_text()
        assert str(folder) not in text, "a folder of this machine"
        return json.loads(text) | {"folder": folder}

    return result


@pytest.mark.parametrize("benchmark", FIGURES, ids=lambda module: module.__name__.split(".")[1])
def test_quick_figures_are_finite_and_positive(benchmark, result_of):
    result = result_of(benchmark)
    for figure in FIGURES[benchmark]:
        assert math.isfinite(result[figure]), figure
        assert result[figure] > 0, figure
    assert result["quick"] is True
    assert {"machine", "versions", "command", "settings"} <= result.keys()
    assert result["rows"]


def test_the_overhead_of_a_search_is_split_and_both_sides_train_on_the_same_rows(result_of):
    result = result_of(search)
    for name in ("search_overhead", "search_overhead_totals"):
        assert math.isfinite(result[name])
    parts = result["split_seconds"]
    assert set(parts) == {"norms", "baseline", "probe", "masks", "rest"}
    assert parts["probe"] > 0
    assert parts["masks"] > 0
    assert sum(parts.values()) == pytest.approx(sum(result["extra_seconds"].values()))
    read = result["forwards"]
    assert read["plain"]["train"] == read["search"]["train"] == {"rows": 16, "tokens": 256}
    assert read["plain"]["probe"]["rows"] == 0
    assert read["search"]["probe"]["rows"] > 0
    assert result["published_schedule"]["computed"] is True


def test_the_flops_of_a_step_are_those_of_its_products():
    model = tiny_model("llama")
    text = model.config
    weights = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    pairs = sum(2 * (i + 1) for i in range(10))  # two rows, causal, the diagonal included
    attention = 4 * pairs * text.hidden_size * text.num_hidden_layers
    output = 2 * 3 * text.hidden_size * text.vocab_size
    expected = 4 * weights * 20 + 3 * attention + 4 * output
    counted = step.step_flops(model, 2, 10, 3)
    assert counted == pytest.approx(expected, rel=0.05)
    assert counted < expected, "the diagonal is left out"


def test_the_share_of_products_is_that_of_the_time_in_matrix_products(result_of):
    matrix, vector = torch.ones(700, 700), torch.ones(3)
    assert step.products_share(lambda: [matrix @ matrix for _ in range(3)]) > 0.8
    assert step.products_share(lambda: [vector.sin() for _ in range(3)]) == 0
    for case in (row for row in result_of(step)["rows"] if "flops" in row):
        assert 0 < case["products_share"] < 1


def test_padding_is_counted_in_tokens():
    class Row:
        def __init__(self, length):
            self.input_ids = (0,) * length

    assert step.padding([Row(5)] * 6, 4) == {"by-step": 1.0, "by-length": 1.0}
    found = step.padding([Row(n) for n in (10, 2, 10, 2, 10, 2, 10, 2)], 2)
    assert found["by-length"] == 1.0
    assert 1.2 < found["by-step"] <= 40 / 24


def test_both_rounds_of_masks_leave_the_same_zeros():
    ours, plain = masks.adapter(20_000), masks.adapter(20_000)
    masks.our_round(ours)
    masks.plain_cut(plain, masks.COMMITTED)
    for name, param in ours.params.items():
        assert torch.equal(param, plain.params[name])


def test_growth_gives_a_line_for_every_quantity_and_draws_it(result_of):
    result = result_of(growth)
    assert [row["quantity"] for row in result["rows"]] == list(result["slopes"])
    for row in result["rows"]:
        assert all(map(math.isfinite, (row["slope"], row["intercept"], row["r2"])))
        assert all(point["median"] > 0 for point in row["points"])
    assert (result["folder"] / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_is_fitted_by_least_squares():
    assert growth.line([1, 2, 3], [3, 5, 7]) == pytest.approx((2, 1, 1))
    slope, intercept, r2 = growth.line([0, 1, 2, 3], [0, 2, 1, 3])
    assert (slope, intercept) == pytest.approx((0.8, 0.3))
    assert r2 == pytest.approx(0.64)


def test_the_published_schedule_is_counted_as_published():
    assert Schedule(train=50, dev=50, epochs=10).counts() == {
        "search example": 500,
        "round": 50,
        "final example": 500,
        "final update": 70,
        "dev row": 500,
    }


def test_what_is_projected_says_so(result_of):
    result = result_of(end_to_end)
    assert result["authors_schedule"]["projected"] is True
    assert result["measured_points"] == 1
    assert result["seconds"]["grid"] > result["seconds_per_run"]["grid"]
    assert result["runs"] == {"restart": 2, "continue": 1, "grid": 8, "authors": 2}


def test_the_parts_of_a_way_are_its_whole_time(result_of):
    result = result_of(end_to_end)
    for way in ("restart", "continue"):
        stages = [row["seconds"] for row in result["rows"] if row.get("way") == way]
        parts = result["parts_seconds"][way]
        assert sum(parts.values()) == pytest.approx(sum(stages), rel=0.02)
        assert min(parts["step"], parts["dev"], parts["probe"]) > 0


def test_ways_take_turns_and_who_goes_first_alternates():
    calls: list[str] = []
    ways = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = common.in_turns(ways, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3}


def test_the_failure_of_one_side_ends_the_other():
    baton = search.Baton(search.turn_plan(["a", "b"], 2))

    class Trainer:
        def __init__(self, turns, fault):
            self.turns, self.fault = turns, fault

        def train(self):
            if self.fault:
                raise ZeroDivisionError("of this side")
            state = type("State", (), {"global_step": 1, "max_steps": 2})
            self.turns.on_step_end(None, state, None)

    sides = []
    for name in "ab":
        turns = search.TurnCallback(name, baton, Clock())
        trainer = Trainer(turns, fault=name == "b")
        sides.append((search.Side(trainer, None), turns))
    with pytest.raises(ZeroDivisionError, match="of this side"):
        search.train_in_turns(sides, baton)


def test_a_process_of_its_own_reports_its_memory_and_its_failure(result_of):
    peaks = [row["process_peak_bytes"] for row in result_of(search)["rows"] if "step" not in row]
    assert len(peaks) == 2
    assert all(50 < common.mib(peak) < 4096 for peak in peaks)
    with pytest.raises(RuntimeError, match="no_such_function"):
        common.isolated("benchmarks.common:no_such_function", {})


def test_a_design_of_the_budget_is_charged_for_the_rows_it_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(budget, "former_searches", lambda _seeds: None)
    out = tmp_path / "budget.json"
    budget.main(["--quick", "--only", "default (12 rows)", "4 rows", "--json", str(out)])
    found = json.loads(out.read_text())["designs"]
    whole, few = found["default (12 rows)"], found["4 rows"]
    assert whole["forwards"] == 8 * 3 * 12
    assert few["forwards"] == 8 * 3 * 4
    # a forward is half of a training row; 50 rows x 10 epochs
    assert whole["share_of_fine_tuning"] == pytest.approx(288 / 2 / 500)
    for design in found.values():
        assert 0 <= design["regret"] < 1
        assert 0 <= design["learned_clear"] <= 1
    assert whole["regret_difference"] == 0
    assert "| 4 rows | 96 |" in capsys.readouterr().out


def test_an_engine_is_held_against_peft_by_its_tokens():
    wanted = [{"first": {7: 0.5, 8: 0.25}, "answer": [7, 1]}, {"first": {3: 0.9}, "answer": [3, 2]}]
    found = [{"first": {"7": 0.4}, "answer": [7, 1]}, {"first": {"3": 0.8}, "answer": [3, 9]}]
    held = engines.held_against(wanted, found)
    assert held == {"difference": 0.25, "same_first": 2, "same_answers": 1}


def test_what_a_converter_without_patterns_reads_is_another_delta(tmp_path):
    """The tensors as they are, and the global alpha: 8 / 12 in place of 6 / 12 for q_proj."""
    model = tiny_model()
    adapter = engines.mixed_adapter(model, tmp_path / "mixed")
    file = engines.as_converted(adapter, layout_of(model.config), tmp_path / "a.gguf")
    reader = gguf.GGUFReader(file)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {one.name: torch.tensor(one.data.copy()) for one in reader.tensors}
    A, B = (tensors[f"blk.0.attn_v.weight.lora_{side}"] for side in "ab")
    factors = read_adapter(adapter).adapter["model.layers.0.self_attn.v_proj"]
    torch.testing.assert_close(
        alpha / A.shape[0] * (B @ A), factors.scaling * factors.B @ factors.A
    )
    rank = tensors["blk.0.attn_q.weight.lora_a"].shape[0]
    other = read_adapter(adapter).adapter["model.layers.0.self_attn.q_proj"].scaling
    assert (alpha / rank, other) == (8 / 12, 6 / 12)


@pytest.mark.parametrize("kind", leaks.KINDS)
def test_the_benchmark_of_leaks_finds_what_comparing_all_pairs_finds(kind):
    leaks.check(kind, 80)
    figures = leaks.measure(kind, 80)
    assert figures["rows"] == 80
    assert (figures["leaks"] > 70) == (kind == "copies")


def test_the_benchmark_of_descriptions_measures_the_command(tmp_path):
    tiny_backbone_folder(tmp_path)
    figures = describing.measure(40, str(tmp_path))
    assert figures["rows"] == 40
    assert 0 < figures["cpu_seconds"]
    assert 30 < figures["peak_mb"] < 4000


def test_a_command_whose_result_is_done_costs_less_than_its_first_call():
    helped, merged = done.measure(1, only=["merge"])
    assert (helped["command"], merged["command"]) == ("--help", "merge")
    assert 0 < merged["again"]["cpu_seconds"] < merged["first"]["cpu_seconds"]
    with pytest.raises(RuntimeError, match=r"(?s)ended with code 2:.*nonsense"):
        done.call(["nonsense"])


def test_answers_and_losses_are_split_by_part(result_of):
    rows = [row for row in result_of(evaluation)["rows"] if "bare" in row]
    assert [row["part"] for row in rows] == list(evaluation.PARTS)
    for way in ("bare", "with an adapter"):
        assert all(row[way] > 0 for row in rows)
