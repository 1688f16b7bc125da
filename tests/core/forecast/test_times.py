"""The model of cost: every figure is checked against one that is counted by hand or in a model."""

import itertools

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from grasp_lora.core.forecast.machines import GPUS, SHAPES, Machine, Shape
from grasp_lora.core.forecast.times import (
    ALL,
    FOUR_BITS,
    Search,
    Setting,
    answer_seconds,
    fits,
    gather_seconds,
    held_bytes,
    kernel,
    last_rank_that_pays,
    layer_seconds,
    makespan,
    memory_bytes,
    read_seconds,
    search_times,
    sharded,
    step_seconds,
    weight_bytes,
)
from grasp_lora.models.memory import plan_config_memory
from grasp_lora.models.modules import linear_modules

TINY = Shape(2, 16, 48, 4, 2, 4, 100)
FREE = Machine(1e12, 1e12, 1e30, 1e30, 1e30, 0.0, waits=True)
"""Only FLOPs of products and of attention take time."""


def model_of(shape):
    import torch

    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config), config


@pytest.mark.parametrize("name", ["1B", "8B", "70B"])
def test_a_shape_has_as_many_entries_as_the_model(name):
    shape = SHAPES[name]
    model, _ = model_of(shape)
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    assert shape.parameters == sum(p.numel() for p in model.parameters()) - norms
    linear = {n.rsplit(".", 1)[-1]: m for n, m in linear_modules(model).items()}
    assert shape.matrices == {n: (m.in_features, m.out_features) for n, m in linear.items()}
    assert shape.parameters / 1e9 == pytest.approx(float(name[:-1]), rel=0.25)


def test_the_memory_of_a_step_is_that_of_the_memory_plan():
    shape = SHAPES["8B"]
    _, config = model_of(shape)
    plan = plan_config_memory(config, rank=16, batch_size=4, length=256)
    setting = Setting(shape, FREE, rank=16)
    logits = 4 * 8 * shape.vocabulary * 12
    wanted = plan.total - 4 * 256 * 2 * shape.vocabulary * 4 + logits
    assert memory_bytes(setting, 4, 256) == pytest.approx(wanted, rel=1e-3)
    four = plan_config_memory(config, quantization="4bit").weights
    assert weight_bytes(Setting(shape, FREE, entry=FOUR_BITS)) == pytest.approx(four, rel=1e-3)


def test_a_kernel_takes_the_longer_of_its_flops_and_its_bytes():
    machine = Machine(10.0, 5.0, 2.0, 1.0, 1.0, 0.0)
    assert kernel(machine, 100.0, 1.0) == 10.0
    assert kernel(machine, 1.0, 100.0) == 50.0
    assert kernel(machine, 100.0, 1.0, machine.attention_rate) == 20.0


def test_a_step_computes_four_flops_for_each_weight_and_token():
    setting = Setting(TINY, FREE, rank=2, targets=("q_proj", "v_proj"))
    tokens, pairs, answers = 3 * 10, 3 * 10 * 10 / 2, 3 * 5
    weights = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 48)
    adapter = 2 * 2 * ((16 + 16) + (16 + 8))
    attention = 4 * pairs * 16 * 2
    forward = 2 * (weights + adapter) * tokens + attention
    output = 2 * 100 * 16 * answers
    assert read_seconds(setting, 3, 10, 5) * 1e12 == pytest.approx(forward + output)
    step = 4 * (weights + adapter) * tokens + 3 * attention + 2 * output
    assert step_seconds(setting, 3, 10, 5) * 1e12 == pytest.approx(step)
    assert setting.adapter == adapter


def test_a_token_that_is_written_reads_the_weights_and_the_cache_once():
    slow = Machine(1e30, 1e30, 1e9, 1e30, 1e30, 0.0, waits=True)
    setting = Setting(SHAPES["8B"], slow, rank=1, targets=("q_proj",))
    prompt = read_seconds(setting, 1, 1000, 1)
    token = (answer_seconds(setting, 1, 1000, 100) - prompt) / 100
    shape = setting.shape
    weights = 2 * (shape.weights + shape.vocabulary * shape.hidden)
    cache = 2 * 2 * shape.layers * shape.key_width * 1051
    assert token == pytest.approx((weights + cache) / 1e9, rel=0.01)


def test_a_host_that_runs_ahead_hides_the_shorter_time_and_one_that_waits_adds_both():
    ahead = Machine(1e12, 1e12, 1e30, 1e30, 1e30, 1e-3)
    waits = Machine(1e12, 1e12, 1e30, 1e30, 1e30, 1e-3, waits=True)
    device = read_seconds(Setting(TINY, FREE), 1, 10)
    assert read_seconds(Setting(TINY, ahead), 1, 10) == pytest.approx(2e-3)
    assert read_seconds(Setting(TINY, waits), 1, 10) == pytest.approx(2e-3 + device)
    many = read_seconds(Setting(TINY, FREE), 10_000, 100)
    assert read_seconds(Setting(TINY, ahead), 10_000, 100) == pytest.approx(many)


def test_four_bits_take_longer_for_many_tokens_and_less_for_one():
    whole = Setting(SHAPES["8B"], GPUS["h100"])
    four = Setting(SHAPES["8B"], GPUS["h100"], entry=FOUR_BITS)
    assert layer_seconds(four, 4, 512) > layer_seconds(whole, 4, 512)
    assert weight_bytes(four) < weight_bytes(whole) / 2


def test_checkpointing_takes_longer_and_less_memory():
    plain = Setting(SHAPES["8B"], GPUS["h100"])
    again = Setting(SHAPES["8B"], GPUS["h100"], checkpointing=True)
    ratio = step_seconds(again, 4, 512) / step_seconds(plain, 4, 512)
    assert 1.2 < ratio < 1.6
    assert memory_bytes(again, 4, 512) < memory_bytes(plain, 4, 512)


def test_accumulated_forwards_take_the_memory_of_one_and_start_their_kernels_each():
    whole = Setting(SHAPES["8B"], GPUS["h100"])
    parts = Setting(SHAPES["8B"], GPUS["h100"], together=2)
    assert memory_bytes(parts, 8, 512) == memory_bytes(whole, 2, 512)
    assert step_seconds(parts, 8, 512) >= step_seconds(whole, 8, 512)
    assert memory_bytes(parts, 8, 512, ranks=8) == memory_bytes(whole, 1, 512)
    tiny = Setting(TINY, GPUS["h100"], together=2)
    starts = [step_seconds(Setting(TINY, GPUS["h100"]), 2, 10), step_seconds(tiny, 8, 10)]
    assert starts[1] == pytest.approx(4 * starts[0], rel=0.01)


def test_ranks_share_the_rows_of_a_step_and_no_more_of_them_work_than_there_are_rows():
    setting = Setting(SHAPES["8B"], GPUS["h100"])
    times = {n: step_seconds(setting, 8, 512, ranks=n) for n in (1, 2, 8, 16)}
    assert times[1] > times[2] > times[8]
    assert times[16] > times[8]


def test_gathering_sends_all_but_the_own_part_and_takes_the_slower_network_between_nodes():
    machine = Machine(1, 1, 1, 1, 100.0, 0.0, network=10.0)
    assert gather_seconds(machine, 1000, 1) == 0
    assert gather_seconds(machine, 1000, 4) == pytest.approx(7.5, rel=1e-3)
    assert gather_seconds(machine, 1600, 16) == pytest.approx(150, rel=1e-3)


def test_weights_are_divided_only_where_they_do_not_fit():
    big, small = Setting(SHAPES["70B"], GPUS["h100"]), Setting(SHAPES["8B"], GPUS["h100"])
    assert not fits(big, 4, 256, 1)
    assert sharded(big, 4, 256, 4)
    assert fits(big, 4, 256, 4)
    assert not sharded(small, 4, 256, 4)
    assert held_bytes(small, 4, 256, 4) == memory_bytes(small, 4, 256, 4)
    assert held_bytes(big, 4, 256, 8) < held_bytes(big, 4, 256, 4) < memory_bytes(big, 4, 256, 4)


def test_probes_ride_along_or_are_done_beside():
    setting, search = Setting(SHAPES["8B"], GPUS["a100"]), Search()
    one, four = (search_times(setting, search, n) for n in (1, 4))
    assert one.whole == one.training + one.riding
    assert four.riding < one.riding / 3
    assert one.beside == max(one.training, one.riding)
    assert one.riding / one.training == pytest.approx(288 / 2 / 520, rel=0.15), "half of a step's"


def test_more_ranks_pay_until_a_step_has_no_more_rows():
    setting = Setting(SHAPES["8B"], GPUS["a100"])
    assert last_rank_that_pays(setting, Search(rows=4, length=1024), 64) in (4, 8)
    assert last_rank_that_pays(setting, Search(rows=64, length=1024), 64) >= 16
    assert last_rank_that_pays(Setting(SHAPES["70B"], GPUS["l4"]), Search(), 2) == 0
    large = Setting(SHAPES["70B"], GPUS["h100"])
    assert last_rank_that_pays(large, Search(), 64) >= 2


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_stages_are_done_as_soon_as_a_worker_is_free_and_their_inputs_are_there(workers):
    stages = {"a": (3.0, ()), "b": (2.0, ()), "c": (4.0, ("a", "given")), "d": (1.0, ("b",))}
    wanted = {1: 10.0, 2: 7.0, 3: 7.0, 8: 7.0}
    assert makespan(stages, workers) == wanted[workers]
    assert makespan({}, workers) == 0


def test_every_gpu_and_size_gives_finite_times():
    for machine, shape in itertools.product(GPUS.values(), SHAPES.values()):
        setting = Setting(shape, machine, targets=ALL)
        for ranks in (1, 8, 64):
            assert 0 < step_seconds(setting, 4, 256, ranks=ranks) < 100
        assert 0 < answer_seconds(setting, 16, 256, 32) < 100
