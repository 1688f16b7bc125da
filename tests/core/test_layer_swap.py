"""A layer swap, module by module."""

import pytest
import torch

from grasp_lora.core.layer_swap import layer_of, layer_swap, outer_layers
from grasp_lora.core.lora import LoraFactors


def adapter(seed, names, rank=2):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: LoraFactors(
            torch.randn(rank, 5, generator=generator),
            torch.randn(4, rank, generator=generator),
            2.0,
        )
        for name in names
    }


def names(layers):
    return [f"model.layers.{layer}.{end}" for layer in layers for end in ("q_proj", "v_proj")]


@pytest.mark.parametrize(
    ("layers", "outer"),
    [
        (range(3), {0, 2}),
        (range(4), {0, 3}),
        (range(6), {0, 1, 4, 5}),
        (range(8), {0, 1, 6, 7}),
        (range(18), {0, 1, 2, 3, 4, 13, 14, 15, 16, 17}),
        ((4, 7, 9, 12), {4, 12}),
    ],
)
def test_a_quarter_of_the_layers_at_each_end_is_outer(layers, outer):
    assert outer_layers({"source": adapter(0, names(layers)), "target": {}}) == outer


def test_each_module_is_that_of_one_adapter_whole():
    every = [*names(range(8)), "lm_head"]
    source, target = adapter(1, every, rank=3), adapter(2, every)
    merged = layer_swap(source, target)
    assert merged.keys() == set(every)
    for name, module in merged.items():
        kept = source if layer_of(name) in (2, 3, 4, 5) else target
        assert torch.allclose(module.B @ module.A, kept[name].delta(), atol=1e-6)
        assert [part.source for part in module.parts] == [0 if kept is source else 1]


def test_a_module_that_its_adapter_lacks_is_left_out():
    source, target = adapter(1, names(range(4))), adapter(2, names([0]))
    assert layer_swap(source, target).keys() == set(names([0, 1, 2]))


def test_what_has_no_middle_or_leaves_nothing_of_an_adapter_is_refused():
    two = adapter(1, names(range(2)))
    with pytest.raises(ValueError, match="at least three layers, these change 2"):
        layer_swap(two, two)
    with pytest.raises(ValueError, match="the target adapter changes none of the outer layers"):
        layer_swap(adapter(1, names(range(4))), adapter(2, names([1])))
    with pytest.raises(ValueError, match="the source adapter changes none of the middle layers"):
        layer_swap(adapter(1, names([0])), adapter(2, names(range(4))))
