"""A batch of 8 equals 8 batches of 1, for every architecture, with position ids from the mask."""

import pytest
import torch
from torch.nn import functional

from architectures import ENCODER_DECODERS, Architecture, spanish_questions
from grasp_lora.models.backbones import ModelSpec, load_backbone
from grasp_lora.models.example_losses import (
    SHARED_PREFIX,
    EncodedExamples,
    can_share_prefix,
    example_losses,
)
from grasp_lora.tasks.encoding import Collator, EncodedExample, TwoSidedCollator
from helpers import (
    tiny_backbone_folder,
    tiny_bloom_model,
    tiny_gemma4_model,
    tiny_model,
    tiny_recurrent_model,
)


def rows(count: int = 8) -> list[EncodedExample]:
    generator = torch.Generator().manual_seed(0)
    out = []
    for i in range(count):
        length = 5 + 2 * i
        ids = tuple(torch.randint(1, 256, (length,), generator=generator).tolist())
        out.append(EncodedExample(str(i), str(i), ids, length - 2 - i % 3, 0))
    return out


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "qwen3"])
def test_batch_of_8_equals_8_batches_of_1(arch):
    model = tiny_model(arch).eval()
    encoded = rows()
    collate = Collator(pad_id=0)
    together = example_losses(model, EncodedExamples(encoded, collate, 8).batches(range(8)), 8)
    alone = example_losses(model, EncodedExamples(encoded, collate, 1).batches(range(8)), 8)
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize("one", ENCODER_DECODERS, ids=lambda one: one.name)
def test_losses_of_an_encoder_decoder_are_those_of_the_answer_alone(one: Architecture):
    """The reference lets transformers write both sides, shift the labels and read one example."""
    model, asked = one.model(), spanish_questions(one)
    wanted: list[float] = []
    for each in asked:
        ids, labels = torch.tensor([each.prompt]), torch.tensor([each.target])
        with torch.no_grad():
            output = model(input_ids=ids, labels=labels)
        losses = functional.cross_entropy(output.logits[0], labels[0], reduction="none")
        words = [n for n, token in enumerate(each.target) if token not in language_ids(one)]
        assert len(words) == each.row.label_tokens
        wanted.append(float(losses[words].mean()))
        if len(words) == len(each.target):
            assert wanted[-1] == pytest.approx(float(output.loss), abs=1e-6)
    collate = TwoSidedCollator(model.config.pad_token_id)
    for size in (1, 3):
        batches = EncodedExamples([each.row for each in asked], collate, size).batches(range(4))
        assert example_losses(model, batches, 4) == pytest.approx(wanted, abs=1e-5)
    assert not can_share_prefix(model, 100)


def language_ids(one: Architecture) -> set[int]:
    """Return the ids of the tokens that name a language."""
    tokenizer = one.tokenizer()
    added = tokenizer.get_added_vocab().items()
    return {token for name, token in added if "_" in name}


def test_gpt2_without_position_ids_would_be_wrong():
    model = tiny_model("gpt2").eval()
    encoded = rows()
    plain = Collator(pad_id=0, with_position_ids=False)
    together = example_losses(model, EncodedExamples(encoded, plain, 8).batches(range(8)), 8)
    alone = example_losses(model, EncodedExamples(encoded, plain, 1).batches(range(8)), 8)
    assert max(abs(a - b) for a, b in zip(together, alone, strict=True)) > 1e-3


def test_rows_come_in_their_own_order_with_like_lengths_together():
    batches = EncodedExamples(rows(), Collator(pad_id=0), 3).batches([7, 0, 3, 5])
    positions = [p for chunk, _ in batches for p in chunk]
    assert positions == [0, 3, 2, 1]
    assert [len(chunk) for chunk, _ in batches] == [2, 2], "less padding than the longest three"
    assert [b["input_ids"].shape[1] for _, b in batches] == [19, 11]


def test_the_output_layer_of_a_frozen_backbone_is_not_multiplied_by_bmm(tmp_path):
    folder = tiny_backbone_folder(tmp_path / "base")
    backbone = load_backbone(ModelSpec(str(folder), dtype="float32", device="cpu"))
    batches = EncodedExamples(rows(), Collator(pad_id=0), 8).batches(range(8))
    with torch.profiler.profile(record_shapes=True) as profile:
        example_losses(backbone.model, batches, 8)
    vocabulary = backbone.model.config.vocab_size
    products = [
        event
        for event in profile.events()
        if event.name == "aten::bmm"
        and any(vocabulary in shape for shape in event.input_shapes if shape)
    ]
    assert not products


def questions(contexts: int = 3, each: int = 4, length: int = 30) -> list[EncodedExample]:
    """Return examples that share their first `length` tokens by context, shuffled."""
    generator = torch.Generator().manual_seed(1)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 256, (count,), generator=generator).tolist())

    texts = [draw(length) for _ in range(contexts)]
    return [
        EncodedExample(f"{i}-{j}", str(i), texts[i] + draw(4 + 2 * j + i), length + 2 + j, 0)
        for j in range(each)
        for i in range(contexts)
    ]


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text", "qwen3"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_a_common_beginning_read_once_changes_no_loss(arch, size):
    model = tiny_model(arch).eval()
    encoded = [*questions(), *rows(3)]
    assert can_share_prefix(model, max(len(row.input_ids) for row in encoded))
    collate = Collator(pad_id=0)
    alone = example_losses(model, EncodedExamples(encoded, collate, 1).batches(range(15)), 15)
    shared = EncodedExamples(encoded, collate, size, 8, share_prefix=True).batches(range(15))
    assert sum(SHARED_PREFIX in batch for _, batch in shared) >= 3
    assert sorted(p for chunk, _ in shared for p in chunk) == list(range(15))
    assert example_losses(model, shared, 15) == pytest.approx(alone, abs=1e-5)


def test_the_common_beginning_is_read_once_and_full_logits_will_do():
    model = tiny_model().eval()
    encoded = questions()
    collate = Collator(pad_id=0, with_logits_to_keep=False)
    alone = example_losses(model, EncodedExamples(encoded, collate, 1).batches(range(12)), 12)
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, args: read.append(args[0].numel())
    )
    batches = EncodedExamples(encoded, collate, 8, 8, share_prefix=True).batches(range(12))
    assert example_losses(model, batches, 12) == pytest.approx(alone, abs=1e-5)
    hook.remove()
    assert sum(read) == 3 * 30 + sum(4 * (4 + 2 * 3 + i) for i in range(3))


def test_layers_that_use_the_keys_of_others_do_not_stop_the_sharing():
    model = tiny_gemma4_model()
    assert can_share_prefix(model, 64)
    assert not can_share_prefix(model, 65)
    encoded, collate = questions(), Collator(pad_id=0)
    alone = example_losses(model, EncodedExamples(encoded, collate, 1).batches(range(12)), 12)
    shared = EncodedExamples(encoded, collate, 8, 8, share_prefix=True).batches(range(12))
    assert example_losses(model, shared, 12) == pytest.approx(alone, abs=1e-5)


def test_only_models_whose_cache_is_by_position_share():
    gemma = tiny_model("gemma3_text")
    assert can_share_prefix(gemma, 64)
    assert not can_share_prefix(gemma, 65), "a row outgrows the window of its sliding layers"
    assert not can_share_prefix(tiny_bloom_model(), 20), "it takes no position ids"
    assert not can_share_prefix(tiny_recurrent_model(), 20), "part of it is no attention"
