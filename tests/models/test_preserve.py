"""What a probe does to the weights is seen, in whatever way it writes."""

import pytest
import torch
from torch import nn

from grasp_lora.models import preserve
from grasp_lora.models.preserve import preserved

WRITES = {
    "in place": lambda p: p.detach().mul_(1.01),
    "through .data": lambda p: p.data.mul_(1.01),
    "one entry": lambda p: p.data.view(-1)[7].mul_(2),
    "another tensor": lambda p: setattr(p, "data", p.data + 1),
    "all signs": lambda p: p.data.neg_(),
    "swapped": lambda p: p.data.view(-1)[:2].copy_(p.data.view(-1)[:2].flip(0).clone()),
    "numpy": lambda p: p.detach().view(torch.uint8).numpy().view("uint8").fill(3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_a_body_that_changes_weights_is_told_however_it_writes(write, dtype):
    draw = torch.Generator().manual_seed(0)
    params = {n: nn.Parameter(torch.randn(5, 4, generator=draw).to(dtype)) for n in ("a", "b")}
    params["a"].grad = torch.ones_like(params["a"])
    model = nn.Linear(2, 2)
    state = torch.get_rng_state()

    def probe():
        with preserved(model, params):
            torch.rand(3)
            write(params["b"])

    with pytest.raises(RuntimeError, match=r"wrote to the adapter weights \(b and 0 more\)"):
        probe()
    assert torch.equal(params["a"].grad, torch.ones_like(params["a"]))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_single_flipped_bit_and_every_pair_of_signs_is_seen():
    weights = torch.randn(12, generator=torch.Generator().manual_seed(1))
    model, params = nn.Linear(2, 2), {"a": nn.Parameter(weights.clone())}

    def seen(write) -> bool:
        params["a"].data.copy_(weights)
        try:
            with preserved(model, params):
                write(params["a"].data)
        except RuntimeError:
            return True
        return False

    bits = [1 << n for n in range(31)] + [-(1 << 31)]
    for place in range(12):
        for bit in bits:
            assert seen(lambda p, i=place, b=bit: p.view(torch.int32)[i].bitwise_xor_(b)), bit
        for other in range(place):
            pair = torch.ones(12).index_fill_(0, torch.tensor([place, other]), -1.0)
            assert seen(lambda p, signs=pair: p.mul_(signs)), (place, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_in_and_between_the_pieces_of_a_long_tensor_are_seen(dtype):
    size = preserve._PIECE
    weights = torch.randn(2 * size + 3, generator=torch.Generator().manual_seed(2)).to(dtype)
    model, params = nn.Linear(2, 2), {"a": nn.Parameter(weights.clone())}

    def seen(places, write) -> bool:
        params["a"].data.copy_(weights)
        try:
            with preserved(model, params):
                places = torch.tensor(places)
                params["a"].data[places] = write(params["a"].data[places])
        except RuntimeError:
            return True
        return False

    for place in (0, size - 1, size, 2 * size, 2 * size + 2):
        assert seen([place], torch.neg), place
    for place in (0, 1, 2):
        for pair in ([place, place + size], [place + size, place + 2 * size]):
            assert seen(pair, torch.neg), pair
            assert seen(pair, lambda values: values.flip(0)), pair
    assert not seen([5, size + 5], torch.clone)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_body_that_only_reads_is_not_blamed(value):
    params = {"a": nn.Parameter(torch.full((3, 5), value).T), "empty": nn.Parameter(torch.ones(0))}
    with preserved(nn.Linear(2, 2), params):
        (params["a"] * 2).sum()
        before = params["a"].detach().clone()
        params["a"].data.zero_()
        params["a"].data.copy_(before)
