"""A prefix that is read once gives the numbers of the whole prompt, behind any sliding window."""

import random

import pytest

from grasp_lora.models.example_losses import EncodedExamples, example_losses
from grasp_lora.models.prefix import PrefixReader, can_read_prefix
from grasp_lora.tasks.encoding import Collator, EncodedExample
from helpers import (
    ARCHITECTURES,
    tiny_bloom_model,
    tiny_gemma4_model,
    tiny_model,
    tiny_recurrent_model,
)

PREFIX = 150


def rows(count: int = 7, longest: int = 90) -> list[EncodedExample]:
    """Return examples that share `PREFIX` tokens; some are longer than the prefix behind them."""
    drawn = random.Random(3)
    ahead = [drawn.randint(5, 200) for _ in range(PREFIX)]
    found = []
    for i in range(count):
        question, answer = drawn.randint(1, longest), drawn.randint(1, 6)
        ids = ahead + [drawn.randint(5, 200) for _ in range(question + answer)]
        found.append(EncodedExample(str(i), str(i), tuple(ids), PREFIX + question, 0))
    return found


def reader(model, encoded) -> PrefixReader:
    return PrefixReader(model, encoded[0].input_ids[:PREFIX])


def losses(model, encoded, size) -> list[float]:
    batches = EncodedExamples(encoded, Collator(0), size).batches(range(len(encoded)))
    return example_losses(model, batches, len(encoded))


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("longest", [20, 90, 300])
def test_losses_are_those_of_whole_prompts(arch, longest):
    model, encoded = tiny_model(arch), rows(longest=longest)
    assert can_read_prefix(model)
    assert getattr(model.config, "sliding_window", None) in (None, 64)
    wanted = losses(model, encoded, 1)
    for size in (1, 3, 7):
        assert losses(reader(model, encoded), encoded, size) == pytest.approx(wanted, abs=1e-5)


def test_the_sliding_window_matters_here():
    """Without it the numbers are others, so a reader that forgot it would be found."""
    model, encoded = tiny_model("gemma3_text"), rows()
    found = losses(reader(model, encoded), encoded, 3)
    model.config.sliding_window = 4096
    for layer in model.model.layers:
        if layer.self_attn.sliding_window:
            layer.self_attn.sliding_window = 4096
    wide = losses(model, encoded, 1)
    assert max(abs(a - b) for a, b in zip(found, wide, strict=True)) > 1e-3


def test_the_prefix_is_read_once_for_all_batches():
    model, encoded = tiny_model(), rows()
    read: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, args: read.append(args[0].numel())
    )
    one = reader(model, encoded)
    losses(one, encoded, 1)
    losses(one, encoded, 1)
    assert sum(read) == PREFIX + 2 * sum(len(e.input_ids) - PREFIX for e in encoded)


def test_layers_that_use_the_keys_of_others_are_read_alike():
    model = tiny_gemma4_model()
    assert can_read_prefix(model)
    encoded = rows()
    found = losses(reader(model, encoded), encoded, 3)
    assert found == pytest.approx(losses(model, encoded, 1), abs=1e-5)


def test_models_that_keep_no_keys_by_position_read_whole_prompts():
    assert not can_read_prefix(tiny_bloom_model()), "it takes no position ids"
    assert not can_read_prefix(tiny_recurrent_model()), "part of it is no attention"
