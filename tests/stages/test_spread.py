"""A ratio for each group: what is measured, when it is believed, and what is pruned."""

import dataclasses
import math

import pytest
import torch
from typer.testing import CliRunner

from grasp_lora.base.files import read_json, read_jsonl, write_json
from grasp_lora.cli import app
from grasp_lora.config.run_config import ConfigError, load_config
from grasp_lora.core.controller.profiles import ProfileChoice, choose_profile
from grasp_lora.core.evidence.groups import Gain
from grasp_lora.core.pruning.group_ratios import SHIFT, combined_ratios, group_trials
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.core.pruning.masks import pruned_count
from grasp_lora.core.pruning.profile import Place, Profile, profile_ratios
from grasp_lora.models.example_losses import example_losses
from grasp_lora.plans.run import run
from grasp_lora.plans.single import merge_adapters, prune_adapter
from grasp_lora.stages import spread as scope_module
from grasp_lora.stages.spread import spread_of_profile, spread_ratio
from grasp_lora.training import search_callback as callback
from grasp_lora.training.groups import SCOPES, group_sizes, place_of, ratio_by_group, slopes
from grasp_lora.training.live import Block, block_importance
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.merged_folder import read_start
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_job

SPLITS = ("micro_dev", "dev")


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scope")
    tiny_backbone_folder(folder / "base")
    adapters = {
        "source": str(tiny_adapter_folder(folder / "source", tiny_model(), r=4, seed=1)),
        "target": str(tiny_adapter_folder(folder / "target", tiny_model(), r=2, seed=2)),
    }
    values = job(folder, adapters=adapters)
    # Ratios of groups are tested on other contexts than they are chosen on, so several are needed.
    values["data"]["target"]["rows"] |= {"dev": 16, "micro_dev": 12}
    file = write_job(folder / "run.yaml", values)
    config = load_config(file)
    context = open_context(config, quiet=True)
    folders = [config.adapters.source, config.adapters.target]
    merged = merge_adapters(config, folders, folder / "merged", context=context)
    return file, context, merged


def with_scope(context, scope):
    config = context.config.model_copy(update={"scope": scope})
    return type(context)(
        config, context.data, context.backbone, context.task, context.reporter, context.clock
    )


@pytest.mark.parametrize("scope", [s for s in SCOPES if s != "global"])
def test_every_group_loses_its_own_share(given, scope):
    _, context, merged = given
    with context.live(read_start(merged, context.backbone), "source") as live:
        sizes = group_sizes(live, scope)
        assert sum(sizes.values()) == sum(p.numel() for p in live.params.values())
        assert len(sizes) >= 2
        ratios = {group: 0.1 + 0.6 * i / len(sizes) for i, group in enumerate(sizes)}
        rule = block_importance(IMPORTANCE["magnitude"], None)
        (masks,) = live.masks(rule, [ratio_by_group(scope, ratios)])
        for block, a, b in live.effective_blocks():
            ratio = ratios[SCOPES[scope](block)]
            keep_a = masks[block.a].keep()[block.rows]
            keep_b = masks[block.b].keep()[:, block.rows]
            assert int((~keep_a).sum()) == pruned_count(a.numel(), ratio)
            assert int((~keep_b).sum()) == pruned_count(b.numel(), ratio)


def test_groups_are_named_by_kind_layer_and_source(given):
    _, context, merged = given
    with context.live(read_start(merged, context.backbone), "source") as live:
        assert set(group_sizes(live, "module-type")) == {"q_proj", "v_proj"}
        assert set(group_sizes(live, "layer")) == {"layer 0", "layer 1"}
        by_source = group_sizes(live, "adapter")
        assert by_source["adapter 0"] == 2 * by_source["adapter 1"], "ranks 4 and 2"
        with pytest.raises(ValueError, match="search again"):
            live.masks(
                block_importance(IMPORTANCE["magnitude"], None),
                [ratio_by_group("layer", {"layer 0": 0.5})],
            )


def test_what_is_measured_are_the_losses_under_those_masks(given):
    _, context, merged = given
    context = with_scope(context, "adapter")
    with context.live(read_start(merged, context.backbone), "source") as live:
        before = {n: p.clone() for n, p in live.params.items()}
        norms = context.norms(live, context.config.importance)
        found = spread_ratio(context, live, norms, 0.5, SPLITS)
        assert all(torch.equal(p, before[n]) for n, p in live.params.items())

        evidence = found["evidence"]
        rows = context.rows("target", SPLITS)
        ids = [e.id for e in rows.encoded]
        drawn = [ids.index(name) for name in evidence["rows"]]
        sizes = group_sizes(live, "adapter")
        asked = {(t["group"], t["shift"]): t["losses"] for t in evidence["trials"]}
        assert list(asked) == [("adapter 0", -SHIFT), ("adapter 0", SHIFT)]
        rule = block_importance(IMPORTANCE[context.config.importance], norms)
        expected = group_trials(0.5, sizes) | {None: dict.fromkeys(sizes, 0.5)}
        for trial, ratios in expected.items():
            (masks,) = live.masks(rule, [ratio_by_group("adapter", ratios)])
            with live.trial(masks):
                losses = example_losses(live.model, rows.batches(drawn), len(drawn))
            assert (evidence["base"] if trial is None else asked[trial]) == losses
        chosen = combined_ratios(0.5, asked, evidence["base"], range(len(drawn)), sizes)
        assert evidence["chosen"] == chosen
        assert found["forwards"] == len(drawn) * 5
        assert found["ratios"] == (chosen if evidence["shown"] else None)


@pytest.mark.parametrize(("effect", "shown"), [(1.0, True), (0.0, False)])
def test_a_difference_between_groups_is_found_where_there_is_one(given, monkeypatch, effect, shown):
    """The loss falls with what is left of source 1, row by row a little differently."""
    _, context, merged = given
    context = with_scope(context, "adapter")

    with context.live(read_start(merged, context.backbone), "source") as live:
        norms = context.norms(live, context.config.importance)

        def one_state(state, count):
            with state():
                return of_what_is_left(count)

        def of_what_is_left(count):
            blocks = [b for b in live.blocks if b.source == 1]
            left = sum(int(live.params[b.a].detach()[b.rows].count_nonzero()) for b in blocks)
            whole = sum(live.params[b.a].detach()[b.rows].numel() for b in blocks)
            generator = torch.Generator().manual_seed(left)
            noise = 0.01 * torch.randn(count, generator=generator)
            return (2.0 - effect * left / whole + noise).tolist()

        def constructed(model, states, batches, count):
            return [one_state(state, count) for state in states]

        monkeypatch.setattr(scope_module, "losses_in_states", constructed)
        found = spread_ratio(context, live, norms, 0.5, SPLITS)
    assert found["evidence"]["shown"] == shown
    if shown:
        assert found["ratios"]["adapter 1"] < 0.5 < found["ratios"]["adapter 0"]
    else:
        assert found["ratios"] is None


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_there_is_nothing_to_spread_at_the_bounds(given, ratio):
    _, context, merged = given
    context = with_scope(context, "layer")
    with context.live(read_start(merged, context.backbone), "source") as live:
        norms = context.norms(live, context.config.importance)
        found = spread_ratio(context, live, norms, ratio, SPLITS)
    assert found == {"ratios": None, "evidence": None, "forwards": 0}


def test_the_final_run_prunes_each_group_by_its_own_ratio(given, tmp_path):
    _, context, merged = given
    context = with_scope(context, "adapter")
    spread = {"adapter 0": 0.7, "adapter 1": 0.1}
    out = prune_adapter(
        context.config, merged, 0.5, tmp_path / "final", context=context, options={"spread": spread}
    )
    zeros = read_json(out / "stage.json")["zeros"]["per_source"]
    assert zeros == {"0": pytest.approx(0.7, abs=0.01), "1": pytest.approx(0.1, abs=0.01)}
    with pytest.raises(
        ValueError,
        match=r'spread was {"adapter 0": 0\.7, "adapter 1": 0\.1}, is {"adapter 0": 0\.5,',
    ):
        prune_adapter(
            context.config,
            merged,
            0.5,
            out,
            context=context,
            options={"spread": {"adapter 0": 0.5, "adapter 1": 0.5}},
        )


def test_examples_of_three_contexts_choose_nothing(given, monkeypatch):
    _, context, merged = given
    context = with_scope(context, "adapter")
    for split in SPLITS:
        rows = context.encoded("target", split)
        few = [dataclasses.replace(row, group=str(i % 3)) for i, row in enumerate(rows)]
        context._encoded["target", split] = few
    with context.live(read_start(merged, context.backbone), "source") as live:
        norms = context.norms(live, context.config.importance)
        found = spread_ratio(context, live, norms, 0.5, SPLITS)
    assert found == {"ratios": None, "evidence": None, "forwards": 0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite_choose_nothing(given, monkeypatch, bad):
    _, context, merged = given
    context = with_scope(context, "adapter")
    monkeypatch.setattr(
        scope_module,
        "losses_in_states",
        lambda model, states, batches, count: [[bad] * count for _ in states],
    )
    with context.live(read_start(merged, context.backbone), "source") as live:
        norms = context.norms(live, context.config.importance)
        found = spread_ratio(context, live, norms, 0.5, SPLITS)
    assert found["ratios"] is None
    assert (found["evidence"]["gain"], found["evidence"]["shown"]) == (None, False)


def test_a_run_says_what_the_groups_were_worth(given):
    file, context, _ = given
    changes = ["scope=layer", f"output={file.parent / 'layered'}", "controller.low=0.2"]
    out = run(load_config(file, changes), quiet=True)
    found = read_json(out / "ratio.json")
    assert found["scope"] == "layer"
    spread = found["spread"]
    assert spread["forwards"] == 5 * len(spread["evidence"]["rows"])
    rounds = (out / "rounds.jsonl").read_text().splitlines()
    assert found["probe_forwards"] == len(rounds) * 3 * 4 + spread["forwards"]


def test_places_of_blocks_are_read_from_their_modules(given):
    _, context, merged = given
    with context.live(read_start(merged, context.backbone), "source") as live:
        ways = slopes(live)
    assert ways.names == ("depth", "module", "adapter")
    found = ways.positions["model.layers.0.self_attn.q_proj adapter 1"]
    assert found == (-0.5, -0.5, 0.5)
    assert place_of(Block("model.layers.3.mlp.down_proj", None, "", "", slice(0))) == Place(
        3, "mlp", "down_proj", None
    )
    assert place_of(Block("projector.linear", 1, "", "", slice(0))) == Place(None, "", "linear", 1)
    with context.live(read_start(merged, context.backbone), "merged") as live:
        assert slopes(live).names == ("depth", "module")


def test_masks_of_a_profile_prune_its_level_overall(given):
    _, context, merged = given
    with context.live(read_start(merged, context.backbone), "source") as live:
        ways, rule = slopes(live), block_importance(IMPORTANCE["magnitude"], None)
        ratios = profile_ratios(Profile(0.4, (0.3, -0.2, 0.3)), ways, 0.0, 0.8)
        (masks,) = live.masks(rule, [ratio_by_group("policy", ratios)])
        pruned = sum(int((~mask.keep()).sum()) for mask in masks.values())
        entries = sum(p.numel() for p in live.params.values())
        # each tensor of a block rounds its count by itself
        assert pruned / entries == pytest.approx(0.4, abs=len(live.blocks) / entries)
        assert len(set(ratios.values())) > 4


def test_a_run_with_a_policy_tells_the_profile_and_prunes_by_it(given, monkeypatch):
    file, context, _ = given
    profile, gain = Profile(0.4, (0.3, 0.0, -0.2)), Gain(0.1, 0.01, 20)
    found_here = []

    def gained(*state):
        found_here.append(choose_profile(*state))
        return ProfileChoice(profile, gain, Gain(0.2, 0.01, 20))

    # a search as short as this shows no gain
    monkeypatch.setattr(callback, "choose_profile", gained)
    changes = ["scope=policy", f"output={file.parent / 'policy'}", "controller.rounds=4"]
    out = run(load_config(file, [*changes, "train.search.epochs=4"]), quiet=True)
    found, lines = read_json(out / "ratio.json"), read_jsonl(out / "rounds.jsonl")
    assert found_here[0].gain.groups == len(set(lines[-1]["groups"]))
    assert found["probe_forwards"] == sum(len(line["rows"]) * 3 for line in lines)
    assert lines[-1]["kind"] == "confirmation"
    assert lines[-1]["tilts"][:2] == [[0.0] * 3] * 2
    assert any(any(tilts) for line in lines for tilts in line["tilts"])
    assert (found["ratio"], found["verdict"], found["scope"]) == (0.4, "learned", "policy")
    assert found["evidence"]["gain_over_lowest_ratio"] == 0.2
    told = {"level": 0.4, "depth": 0.3, "module": 0.0, "adapter": -0.2}
    assert found["spread"]["profile"] == told
    with context.live(read_start(out / "merged", context.backbone), "source") as live:
        ways = slopes(live)
    ratios = profile_ratios(profile, ways, 0.0, 0.8)
    assert found["spread"]["ratios"] == ratios
    zeros = read_json(out / "shipped" / "stage.json")["zeros"]["per_source"]
    for source in ("0", "1"):
        own = [group for group in ratios if group.endswith(f"adapter {source}")]
        wanted = sum(ways.sizes[g] * ratios[g] for g in own) / sum(ways.sizes[g] for g in own)
        assert zeros[source] == pytest.approx(wanted, abs=0.01)


def test_a_profile_that_is_not_shown_leaves_one_ratio_for_all(given):
    _, context, merged = given
    context = with_scope(context, "policy")
    with context.live(read_start(merged, context.backbone), "source") as live:
        ways = slopes(live)
    profile = Profile(0.4, (0.2, 0.0, -0.1))
    sure, unsure = Gain(0.1, 0.01, 20), Gain(0.01, 0.02, 20)
    taken = spread_of_profile(context, ProfileChoice(profile, sure, sure), ways)
    assert taken["ratios"] == profile_ratios(profile, ways, 0.0, 0.8)
    assert taken["profile"] == {"level": 0.4, "depth": 0.2, "module": 0.0, "adapter": -0.1}
    assert taken["evidence"]["over_lowest_ratio"] == {"gain": 0.1, "standard_error": 0.01}
    left = spread_of_profile(context, ProfileChoice(profile, unsure, sure), ways)
    assert (left["ratios"], left["evidence"]["shown"]) == (None, False)
    nothing = {"ratios": None, "profile": None, "evidence": None, "forwards": 0}
    assert spread_of_profile(context, None, ways) == nothing


def test_a_search_without_a_round_that_tests_a_profile_is_refused(given):
    file, *_ = given
    changes = ["scope=policy", f"output={file.parent / 'short'}", "controller.rounds=3"]
    with pytest.raises(ValueError, match="but the search has 3: raise controller.rounds"):
        run(load_config(file, changes), quiet=True)


def test_ratios_of_another_scope_are_refused(given, tmp_path):
    file, _, merged = given
    ratios = {"ratio": 0.5, "scope": "layer", "spread": {"ratios": {"layer 0": 0.5}}}
    write_json(tmp_path / "ratio.json", ratios)
    arguments = ["finetune", str(file), "--start", str(merged), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*arguments, "--ratio", str(tmp_path / "ratio.json")])
    assert done.exit_code == 2
    assert "set scope: layer" in done.output
    with pytest.raises(ConfigError, match="needs the sources apart"):
        load_config(file, ["scope=adapter", "mask_unit=merged"])
