"""The live adapter: trials restore everything, commits stash and revive, zeros stay zero."""

import copy
import random

import numpy as np
import pytest
import torch

from grasp_lora.core.lora import LoraFactors, merge
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.core.pruning.masks import Mask, pruned_count
from grasp_lora.training.live import (
    Block,
    LiveAdapter,
    attach_live_adapter,
    block_importance,
)
from helpers import logits_of, random_ids, tiny_model

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def factors(model, seed: int, rank: int, modules=MODULES) -> dict[str, LoraFactors]:
    generator = torch.Generator().manual_seed(seed)
    known = dict(model.named_modules())
    return {
        name: LoraFactors(
            torch.randn(rank, known[name].in_features, generator=generator),
            torch.randn(known[name].out_features, rank, generator=generator),
            0.5,
        )
        for name in modules
    }


def live_of(kind: str = "cat", mask_unit: str = "source", ranks=(3, 3), **settings) -> LiveAdapter:
    model = tiny_model("llama")
    adapters = [factors(model, seed, rank) for seed, rank in enumerate(ranks)]
    merged = merge(kind, adapters, [1 / len(ranks)] * len(ranks))
    return attach_live_adapter(model, merged, mask_unit, **settings)


def pruned_at(live: LiveAdapter, ratio: float) -> dict[str, Mask]:
    return live.masks(block_importance(IMPORTANCE["magnitude"], None), [ratio])[0]


def trained_optimizer(live: LiveAdapter, weight_decay: float = 0.1, steps: int = 3):
    optimizer = torch.optim.AdamW(live.params.values(), lr=0.05, weight_decay=weight_decay)
    for step in range(steps):
        train_step(live, optimizer, step)
    return optimizer


def train_step(live: LiveAdapter, optimizer, seed: int) -> None:
    ids = random_ids(seed=seed)
    live.model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    live.zero_pruned()
    optimizer.zero_grad()


@pytest.mark.parametrize("kind", ["cat", "linear"])
@pytest.mark.parametrize("mask_unit", ["source", "merged"])
def test_going_live_keeps_the_logits_of_the_merge(kind, mask_unit):
    model = tiny_model("llama")
    adapters = [factors(model, 0, 3), factors(model, 1, 3)]
    merged = merge(kind, adapters, [0.3, -0.7])
    ids = random_ids()
    weights = {name: dict(model.named_modules())[name].weight.detach().clone() for name in MODULES}
    reference = tiny_model("llama")
    with torch.no_grad():
        for name in MODULES:
            module = dict(reference.named_modules())[name]
            module.weight.copy_(weights[name] + merged[name].B @ merged[name].A)
    live = attach_live_adapter(model, merged, mask_unit)
    assert torch.allclose(logits_of(live.model, ids), logits_of(reference, ids), atol=1e-5)


def test_source_units_of_a_linear_merge_train_each_source_apart():
    live = live_of("linear", "source")
    names = [n for n in live.params if n.endswith(".A.0") or n.endswith(".A.1")]
    assert len(names) == 2 * len(MODULES)
    before = {n: p.detach().clone() for n, p in live.params.items()}
    trained_optimizer(live)
    assert all(not torch.equal(before[n], p) for n, p in live.params.items())
    a = live.plain_factors()[MODULES[0]][0]
    total = live.params[f"{MODULES[0]}.A.0"] + live.params[f"{MODULES[0]}.A.1"]
    assert torch.equal(a, total.detach())


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("kind", "ranks"), [("cat", (2, 5)), ("linear", (3, 3))])
def test_every_source_loses_exactly_the_ratio_in_each_tensor(kind, ranks, ratio):
    live = live_of(kind, "source", ranks)
    masks = pruned_at(live, ratio)
    for block in live.blocks:
        for keep in (masks[block.a].keep()[block.rows], masks[block.b].keep()[:, block.rows]):
            assert int((~keep).sum()) == pruned_count(keep.numel(), ratio)


def test_one_threshold_for_a_concatenated_tensor_prunes_the_smaller_source_harder():
    model = tiny_model("llama")
    small = {
        n: LoraFactors(f.A * 0.1, f.B * 0.1, f.scaling) for n, f in factors(model, 1, 3).items()
    }
    merged = merge("cat", [factors(model, 0, 3), small], [0.5, 0.5])
    live = attach_live_adapter(model, merged, "merged")
    keep = pruned_at(live, 0.5)[f"{MODULES[0]}.A"].keep()
    assert keep[3:].float().mean() < 0.2 < 0.8 < keep[:3].float().mean()


def everything(live: LiveAdapter, optimizer) -> dict[str, object]:
    state = {
        f"{i}.{k}": v.clone() if isinstance(v, torch.Tensor) else v
        for i, p in enumerate(live.params.values())
        for k, v in optimizer.state[p].items()
    }
    return {
        "weights": [p.detach().clone() for p in live.params.values()],
        "gradients": [p.grad.clone() for p in live.params.values()],
        "modes": [m.training for m in live.model.modules()],
        "optimizer": state,
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "stash": [live.effective(n).clone() for n in live.params],
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def in_mid_step():
    """Return a trained and pruned adapter in train mode with gradients, its optimizer, and ids."""
    live = live_of(dropout=0.1)
    optimizer = trained_optimizer(live)
    live.commit(pruned_at(live, 0.4), optimizer)
    ids = random_ids(seed=9)
    live.model(input_ids=ids, labels=ids).loss.backward()
    live.model.train()
    return live, optimizer, ids


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_restores_everything_also_after_an_exception(fails, ratio):
    live, optimizer, ids = in_mid_step()
    live.layers[MODULES[0]].eval()
    before = everything(live, optimizer)

    def meddle() -> None:
        with live.trial(pruned_at(live, ratio)):
            assert not any(m.training for m in live.model.modules())
            if ratio < 1:
                live.model(input_ids=ids, labels=ids).loss.backward()
            live.model.train()
            torch.rand(3), random.random(), np.random.rand()
            if fails:
                raise RuntimeError("in the middle")

    if fails:
        with pytest.raises(RuntimeError, match="in the middle"):
            meddle()
    else:
        meddle()
    assert same(before, everything(live, optimizer))


def test_a_trial_whose_body_writes_weights_is_refused_and_the_rest_restored():
    live = live_of(dropout=0.1)
    optimizer = trained_optimizer(live)
    ids = random_ids(seed=9)
    live.model(input_ids=ids, labels=ids).loss.backward()
    before = everything(live, optimizer)

    def step_inside() -> None:
        with live.trial(pruned_at(live, 0.8)):
            live.model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()

    with pytest.raises(RuntimeError, match="wrote to the adapter weights"):
        step_inside()
    after = everything(live, optimizer)
    for kind in ("gradients", "modes", "torch", "python", "numpy"):
        assert same(before[kind], after[kind])


@pytest.mark.parametrize("kind", ["cat", "linear"])
@pytest.mark.parametrize("committed", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("tried", [0.0, 0.3, 0.6, 1.0])
def test_a_trial_equals_masking_a_whole_copy(kind, committed, tried):
    live = live_of(kind)
    live.commit(pruned_at(live, committed))
    whole = {n: live.effective(n).clone() for n in live.params}
    weights = {n: p.detach().clone() for n, p in live.params.items()}
    masks = pruned_at(live, tried)
    with live.trial(masks):
        for name, param in live.params.items():
            assert torch.equal(param, whole[name] * masks[name].keep())
    assert all(torch.equal(p, weights[n]) for n, p in live.params.items())
    assert all(torch.equal(live.effective(n), whole[n]) for n in whole)


@pytest.mark.parametrize("rule", ["magnitude", "activation"])
@pytest.mark.parametrize("mask_unit", ["source", "merged"])
def test_masks_of_many_ratios_come_from_one_pass_and_equal_those_of_one_ratio(rule, mask_unit):
    live = live_of("cat", mask_unit, ranks=(2, 5))
    generator = torch.Generator().manual_seed(3)
    norms = {
        n: torch.rand(layer.in_features, generator=generator) for n, layer in live.layers.items()
    }
    calls = []

    def score(block, a, b):
        calls.append(block)
        return IMPORTANCE[rule](a, b, norms[block.module])

    ratios = [0.7, 0.1, 0.4]
    together = live.masks(score, ratios)
    assert calls == list(live.blocks)
    for ratio, masks in zip(ratios, together, strict=True):
        (alone,) = live.masks(block_importance(IMPORTANCE[rule], norms), [ratio])
        for name in live.params:
            assert torch.equal(masks[name].keep(), alone[name].keep())


def test_a_module_without_norms_is_scored_by_magnitude():
    live = live_of("cat", "merged")
    known, unread = MODULES
    norms = {known: torch.rand(live.layers[known].in_features)}
    score = block_importance(IMPORTANCE["activation"], norms)
    for block, a, b in live.effective_blocks():
        rule = "magnitude" if block.module == unread else "activation"
        expected = IMPORTANCE[rule](a, b, norms.get(block.module))
        assert all(map(torch.equal, score(block, a, b), expected))


@pytest.mark.parametrize("mask_unit", ["source", "merged"])
def test_averages_of_gradients_are_divided_among_the_blocks(mask_unit):
    live = live_of("cat", mask_unit, ranks=(2, 5))
    generator = torch.Generator().manual_seed(3)
    averages = {n: torch.randn(p.shape, generator=generator) for n, p in live.params.items()}
    score = block_importance(IMPORTANCE["taylor"], averages)
    for block, a, b in live.effective_blocks():
        found_a, found_b = score(block, a, b)
        assert torch.equal(found_a, (a * averages[block.a][block.rows]).abs())
        assert torch.equal(found_b, (b * averages[block.b][:, block.rows]).abs())


def test_kept_entries_get_new_values_and_pruned_ones_come_back_as_they_were():
    live = live_of("cat", "source", ranks=(2, 5))
    whole = {name: param.detach().clone() for name, param in live.params.items()}
    live.commit(pruned_at(live, 0.4))
    seen = []

    def doubled(block, a, b, keep_a, keep_b):
        seen.append((block, a.clone(), b.clone(), keep_a, keep_b))
        return 2 * a, 2 * b

    live.refit(doubled)
    assert [one[0] for one in seen] == list(live.blocks)
    for block, a, b, keep_a, keep_b in seen:
        assert torch.equal(a, whole[block.a][block.rows])
        assert torch.equal(b, whole[block.b][:, block.rows])
        assert torch.equal(keep_a, live.keep(block.a)[block.rows])
        assert torch.equal(keep_b, live.keep(block.b)[:, block.rows])
    for name, param in live.params.items():
        kept = live.keep(name)
        assert torch.equal(param.detach(), 2 * whole[name] * kept)
        assert torch.equal(live.effective(name), torch.where(kept, 2 * whole[name], whole[name]))


@pytest.mark.parametrize("committed", [0.0, 0.5])
def test_a_trial_can_give_kept_entries_other_values_and_takes_them_back(committed):
    live = live_of("cat", "source", ranks=(2, 5))
    whole = {name: param.detach().clone() for name, param in live.params.items()}
    live.commit(pruned_at(live, committed))
    before, masks = live.snapshot(), pruned_at(live, 0.3)
    with live.trial(masks, lambda _block, a, b, _keep_a, _keep_b: (3 * a, -b)):
        for block in live.blocks:
            for name, factor in ((block.a, 3), (block.b, -1)):
                expected = factor * whole[name] * masks[name].keep()
                assert torch.equal(live.params[name].detach(), expected)
    after = live.snapshot()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], one) for name, one in before.items())


def test_masks_and_stash_take_a_bit_an_entry_and_a_value_for_each_pruned_one():
    live = live_of()
    assert live.held_bytes() == 0
    live.commit(pruned_at(live, 0.8))
    entries = sum(p.numel() for p in live.params.values())
    pruned = sum(int((~live.keep(n)).sum()) for n in live.params)
    assert live.held_bytes() == sum(-(-p.numel() // 8) for p in live.params.values()) + 4 * pruned
    assert live.held_bytes() < 1.0 * 4 * entries
    live.commit(pruned_at(live, 0.0))
    assert live.held_bytes() == 0


def test_a_trial_runs_with_the_masked_weights():
    live = live_of()
    masks = pruned_at(live, 0.5)
    ids = random_ids()
    with live.trial(masks):
        seen = logits_of(live.model, ids)
        for name, param in live.params.items():
            assert torch.equal(param == 0, ~masks[name].keep())
    live.commit(masks)
    assert torch.equal(seen, logits_of(live.model.eval(), ids))


@pytest.mark.parametrize("committed", [0.0, 0.4, 1.0])
def test_a_whole_adapter_has_its_stashed_values_for_the_body_alone(committed):
    live = live_of()
    before = {n: p.detach().clone() for n, p in live.params.items()}
    live.commit(pruned_at(live, committed))
    pruned = live.digest()
    with live.unpruned():
        assert all(torch.equal(live.params[n], value) for n, value in before.items())
    assert live.digest() == pruned
    kept = sum(int(live.keep(n).sum()) for n in live.params)
    entries = sum(p.numel() for p in live.params.values())
    assert kept == pytest.approx((1 - committed) * entries, rel=0.02)


def test_a_pruned_entry_comes_back_with_its_stashed_value():
    live = live_of()
    before = {n: p.detach().clone() for n, p in live.params.items()}
    live.commit(pruned_at(live, 0.9))
    assert any((p == 0).any() for p in live.params.values())
    assert all(torch.equal(live.effective(n), before[n]) for n in before)
    live.commit(pruned_at(live, 0.0))
    assert all(torch.equal(p, before[n]) for n, p in live.params.items())


def test_committing_a_ratio_below_the_current_one_revives_what_matters_most():
    live = live_of()
    magnitudes = {n: p.detach().abs() for n, p in live.params.items()}
    live.commit(pruned_at(live, 0.8))
    live.commit(pruned_at(live, 0.5))
    block = live.blocks[0]
    keep = live.keep(block.a)[block.rows]
    scores = magnitudes[block.a][block.rows]
    assert scores[keep].min() >= scores[~keep].max()


@pytest.mark.parametrize("clear", [True, False])
def test_a_commit_clears_the_first_moment_of_newly_pruned_entries_only(clear):
    live = live_of()
    optimizer = trained_optimizer(live)
    live.commit(pruned_at(live, 0.3), optimizer)
    train_step(live, optimizer, 11)
    old = {
        n: (live.keep(n), {k: v.clone() for k, v in optimizer.state[p].items()})
        for n, p in live.params.items()
    }
    masks = pruned_at(live, 0.6)
    live.commit(masks, optimizer, clear)
    for name, param in live.params.items():
        was, state = old[name]
        newly, revived = was & ~masks[name].keep(), ~was & masks[name].keep()
        assert newly.any()
        now = optimizer.state[param]
        expected = state["exp_avg"].masked_fill(newly, 0.0) if clear else state["exp_avg"]
        assert torch.equal(now["exp_avg"], expected)
        assert torch.equal(now["exp_avg_sq"][~revived], state["exp_avg_sq"][~revived])
        assert now["step"] == state["step"]


def adam_by_hand(gradients, keeps, rate):
    """AdamW in float64, by its published formula; masks as the library says, from any start.

    Returns the weights after each step; the masks of a step are those committed before it.
    """
    weight, first, second = (np.zeros(gradients.shape[1:]) for _ in range(3))
    stash, was, trace = weight.copy(), np.ones(weight.shape, bool), []
    for t, (gradient, keep) in enumerate(zip(gradients, keeps, strict=True), 1):
        leaving, back, staying = was & ~keep, keep & ~was, keep & was
        stash[leaving], weight[leaving] = weight[leaving], 0.0
        weight[back] = stash[back]
        first[leaving] = 0.0
        if t > 1 and back.any():
            second[back] = np.maximum(second[back], second[staying].mean())
        was = keep
        gradient = np.where(keep, gradient, 0.0)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        unbiased = np.sqrt(second / (1 - 0.999**t)) + 1e-8
        weight = weight - rate * first / (1 - 0.9**t) / unbiased
        weight[~keep] = 0.0
        trace.append(weight.copy())
    return np.stack(trace)


@pytest.mark.parametrize("revived", [100, 1000])
@pytest.mark.parametrize("pruned", [0, 2, 50])
def test_revived_entries_step_as_far_as_their_neighbours(pruned, revived):
    after, rate, shape = 60, 1e-3, (8, 25)
    draw = np.random.default_rng(0)
    gradients = draw.normal(size=shape) + 3 * draw.normal(size=(revived + after, *shape))
    half = np.arange(200).reshape(shape) % 2 == 0
    keeps = [
        ~half if pruned <= t < revived else np.ones(shape, bool) for t in range(len(gradients))
    ]
    params = {n: torch.nn.Parameter(torch.zeros(s)) for n, s in (("A", shape), ("B", (1, 8)))}
    block = Block("module", None, "A", "B", slice(None))
    live = LiveAdapter(torch.nn.Module(), params, (block,), {})
    optimizer = torch.optim.AdamW([params["A"]], lr=rate, weight_decay=0.0)
    trace = []
    for step, gradient in enumerate(gradients):
        if step in (pruned, revived):
            kept = torch.from_numpy(keeps[step])
            live.commit({"A": Mask.of(kept), "B": Mask.of(torch.ones(1, 8).bool())}, optimizer)
        params["A"].grad = torch.from_numpy(np.where(keeps[step], gradient, 0.0)).float()
        optimizer.step()
        live.zero_pruned()
        trace.append(params["A"].detach().double().numpy())
    trace = np.stack(trace)
    assert np.abs(trace - adam_by_hand(gradients, keeps, rate)).max() < 1e-4 * rate * revived
    steps = np.sqrt((np.diff(trace[revived:], axis=0) ** 2).mean(0))
    assert 0.7 < steps[half].mean() / steps[~half].mean() < 1.1
    assert steps[half].max() < 1.5 * steps[~half].max()


def test_committed_zeros_survive_adamw_with_weight_decay_and_momentum():
    live = live_of("linear")
    optimizer = trained_optimizer(live)
    masks = pruned_at(live, 0.5)
    live.commit(masks, optimizer)
    for step in range(5):
        train_step(live, optimizer, step)
    for name, param in live.params.items():
        assert (param[~masks[name].keep()] == 0).all()
        assert (param[masks[name].keep()] != 0).all()


def test_pruned_entries_do_not_count_in_the_clipping_norm_nor_refill_the_moments():
    live = live_of()
    optimizer = trained_optimizer(live)
    masks = pruned_at(live, 0.7)
    live.commit(masks, optimizer)
    ids = random_ids(seed=4)
    for _ in range(2):  # two batches accumulate
        live.model(input_ids=ids, labels=ids).loss.backward()
    for name, param in live.params.items():
        assert (param.grad[~masks[name].keep()] == 0).all()
    norm = torch.nn.utils.clip_grad_norm_(live.params.values(), 1.0)
    kept = torch.cat([p.grad[masks[n].keep()] for n, p in live.params.items()])
    assert kept.norm() == pytest.approx(min(1.0, float(norm)), rel=1e-4)
    optimizer.step()
    for name, param in live.params.items():
        assert (optimizer.state[param]["exp_avg"][~masks[name].keep()] == 0).all()


def test_enforce_clears_nan_too():
    live = live_of()
    masks = pruned_at(live, 0.5)
    live.commit(masks)
    for name, param in live.params.items():
        param.data[~masks[name].keep()] = float("nan")
    live.zero_pruned()
    assert all((p[~masks[n].keep()] == 0).all() for n, p in live.params.items())


def test_a_snapshot_brings_back_weights_masks_and_stash():
    live = live_of()
    live.commit(pruned_at(live, 0.4))
    saved = live.snapshot()
    expected = {n: live.effective(n) for n in live.params}
    optimizer = trained_optimizer(live)
    live.commit(pruned_at(live, 0.8), optimizer)
    live.load(saved)
    assert all(torch.equal(live.effective(n), expected[n]) for n in expected)
    assert all(torch.equal(p == 0, ~live.keep(n)) for n, p in live.params.items())


def test_svd_mixes_the_sources_so_source_units_are_refused():
    with pytest.raises(ValueError, match="svd"):
        live_of("svd", "source")
    assert live_of("svd", "merged").blocks[0].source is None


@pytest.mark.parametrize("fails", [False, True])
def test_replaced_values_are_those_measured_and_are_put_back(fails):
    live, optimizer, ids = in_mid_step()
    before = everything(live, optimizer)
    name = next(name for name in live.params if name.endswith(".B"))
    half = {name: live.params[name].detach() / 2}
    twin = copy.deepcopy(live.model).eval()
    number = [param is live.params[name] for param in live.model.parameters()].index(True)
    list(twin.parameters())[number].data /= 2
    with live.replaced(half):
        assert not live.model.training
        assert torch.equal(logits_of(live.model, ids), logits_of(twin, ids))
    if fails:
        with pytest.raises(RuntimeError, match="in the middle"), live.replaced(half):
            raise RuntimeError("in the middle")
    assert same(before, everything(live, optimizer))


@pytest.mark.parametrize("fails", [False, True])
def test_a_scaled_adapter_is_the_scaled_delta_and_is_put_back(fails):
    live, optimizer, ids = in_mid_step()
    before = everything(live, optimizer)
    scalings = [layer.scaling["default"] for layer in live.layers.values()]
    for factor in (0.0, 0.5):
        twin = copy.deepcopy(live.model).eval()
        for name, param in twin.named_parameters():
            if "lora_B" in name:
                param.data *= factor
        with live.scaled(factor):
            assert not live.model.training
            assert torch.allclose(logits_of(live.model, ids), logits_of(twin, ids), atol=1e-5)
    with live.scaled(0.0):
        with live.model.disable_adapter():
            bare = logits_of(live.model, ids)
        assert torch.equal(logits_of(live.model, ids), bare)
    if fails:
        with pytest.raises(RuntimeError, match="in the middle"), live.scaled(0.5):
            raise RuntimeError("in the middle")
    assert [layer.scaling["default"] for layer in live.layers.values()] == scalings
    assert same(before, everything(live, optimizer))


@pytest.mark.parametrize(
    ("make", "momentum"),
    [
        (lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9), "momentum_buffer"),
        (lambda ps: torch.optim.RMSprop(ps, lr=0.05, momentum=0.9), "momentum_buffer"),
        (lambda ps: torch.optim.AdamW(ps, lr=0.05, amsgrad=True), "exp_avg"),
        (lambda ps: torch.optim.Adagrad(ps, lr=0.05), None),
        (lambda ps: torch.optim.Adafactor(ps, lr=0.05), None),
    ],
)
def test_masks_are_committed_under_any_optimizer(make, momentum):
    live = live_of()
    optimizer = make(list(live.params.values()))
    for step in range(2):
        train_step(live, optimizer, step)
    live.commit(pruned_at(live, 0.5), optimizer)
    train_step(live, optimizer, 2)
    live.commit(pruned_at(live, 0.2), optimizer)
    for name, param in live.params.items():
        assert torch.equal(param == 0, ~live.keep(name))
        state = optimizer.state[param]
        if momentum is not None:
            assert (state[momentum][~live.keep(name)] == 0).all()
        for second in ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"):
            if second in state:
                assert (state[second][live.keep(name)] > 0).all()


def test_a_released_adapter_lets_all_gradients_pass():
    live = live_of()
    live.commit(pruned_at(live, 0.5))
    ids = random_ids()

    def pruned_gradients() -> bool:
        live.model.zero_grad()
        live.model(input_ids=ids, labels=ids).loss.backward()
        return any(bool(p.grad[~live.keep(n)].any()) for n, p in live.params.items())

    assert not pruned_gradients()
    live.release()
    assert pruned_gradients()
