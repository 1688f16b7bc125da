"""Rows of other trainers: losses do not depend on padding, and what cannot be read is told."""

import pytest
import torch
from transformers import DataCollatorForLanguageModeling

from grasp_lora.models.example_losses import (
    IGNORED,
    EncodedExamples,
    example_losses,
    losses_from_logits,
)
from grasp_lora.models.modules import forward_accepts
from grasp_lora.models.token_rows import RightPadding, token_row
from helpers import tiny_bloom_model, tiny_model, tiny_recurrent_model, tiny_tokenizer

MODELS = {
    "llama": tiny_model,
    "gpt2": lambda: tiny_model("gpt2"),
    "bloom": tiny_bloom_model,
    "recurrent": tiny_recurrent_model,
}
SHORT = {"input_ids": [5, 6, 7, 8], "labels": [IGNORED, IGNORED, 7, 8]}
LONG = {
    "input_ids": [9, *range(11, 31)],
    "labels": [IGNORED] * 4 + [14, 15] + [IGNORED] * 12 + [28, 29, 30],
}


def padded(row, length: int, side: str):
    """Return a row as a collator pads it; its padding is the id 1, and has labels in the way."""
    missing = length - len(row["input_ids"])
    fill = {"input_ids": [1] * missing, "labels": [IGNORED] * missing}
    fill["attention_mask"] = [0] * missing
    real = row | {"attention_mask": [1] * len(row["input_ids"])}
    if side == "right":
        return {name: real[name] + fill[name] for name in fill}
    return {name: fill[name] + real[name] for name in fill}


def by_hand(model, row) -> float:
    """Return a row's loss: the mean over its labels of -log p, read token by token."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
    terms = [
        -float(logits[i - 1].double().log_softmax(-1)[label])
        for i, label in enumerate(row["labels"])
        if label != IGNORED
    ]
    return sum(terms) / len(terms)


@pytest.mark.parametrize("arch", MODELS)
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_a_short_row_beside_a_long_one_has_the_loss_it_has_alone(arch, side):
    model = MODELS[arch]()
    given = [SHORT, LONG]
    if side != "none":
        given = [padded(row, 25, side) for row in given]
    rows = [token_row(row, i, model, None) for i, row in enumerate(given)]
    assert [(list(r.input_ids), list(r.labels)) for r in rows] == [
        (row["input_ids"], row["labels"]) for row in (SHORT, LONG)
    ]
    padding = RightPadding(forward_accepts(model, "logits_to_keep"))
    losses = example_losses(model, [([0, 1], padding(rows))], 2)
    assert losses == pytest.approx([by_hand(model, SHORT), by_hand(model, LONG)], abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kept", [False, True])
def test_labels_anywhere_meet_their_own_logits(side, kept):
    model = tiny_model()
    rows = [padded(row, 25, side) for row in (SHORT, LONG)]
    labels = torch.tensor([row["labels"] for row in rows])
    ids = torch.tensor([row["input_ids"] for row in rows])
    mask = torch.tensor([row["attention_mask"] for row in rows])
    first = int((labels != IGNORED).any(0).nonzero()[0])
    keep = {"logits_to_keep": torch.arange(first - 1, 24)} if kept else {}
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        out = model(input_ids=ids, attention_mask=mask, position_ids=places, **keep)
    found = losses_from_logits(out.logits, labels).tolist()
    assert found == pytest.approx([by_hand(model, SHORT), by_hand(model, LONG)], abs=1e-5)


def test_a_label_of_the_first_token_counts_for_nothing():
    row = token_row({"input_ids": [4, 5, 6], "labels": [4, 5, 6]}, 0, tiny_model(), None)
    assert row.labels == (IGNORED, 5, 6)


def test_rows_without_labels_get_those_of_the_trainers_collator():
    collate = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    row = {"input_ids": [4, 5, 6], "attention_mask": [1, 1, 1], "group": "one context"}
    found = token_row(row, 0, tiny_model(), collate)
    assert (found.input_ids, found.labels, found.group) == (
        (4, 5, 6),
        (IGNORED, 5, 6),
        "one context",
    )


def test_tensors_are_read_as_lists_are():
    tensors = {name: torch.tensor(values) for name, values in padded(SHORT, 9, "left").items()}
    assert token_row(tensors, 3, tiny_model(), None) == token_row(SHORT, 3, tiny_model(), None)


def no_labels(_rows):
    return {"input_ids": torch.tensor([[1, 2]])}


@pytest.mark.parametrize(
    ("row", "collate", "said"),
    [
        ({"prompt": "a", "completion": "b"}, None, "row 7 has ['completion', 'prompt'], but no"),
        ({"input_ids": [1, 2]}, None, "row 7 has no labels, and there is no data collator"),
        ({"input_ids": [1, 2]}, no_labels, "the trainer's data collator makes none"),
        ({"input_ids": [1, 2], "labels": [1, IGNORED]}, None, "row 7 has no token with a loss"),
        ({"input_ids": [], "labels": []}, None, "row 7 has no token with a loss"),
        ({"input_ids": [1, 2], "labels": [1]}, None, "equally long, got {'input_ids': 2"),
        ({"input_ids": [1, 2], "labels": "ab"}, None, "labels is 'ab', but must be"),
        ({"input_ids": [1, 2], "labels": [0.5, 1.0]}, None, "labels is [0.5, 1.0], but must be"),
        ({"input_ids": [1, 2], "labels": [1, 2], "seq_lengths": [1, 1]}, None, "do not pack"),
        ({"input_ids": [1, 2], "labels": [1, 2], "position_ids": [0, 0]}, None, "do not pack"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_read_are_refused_by_their_place(row, collate, said):
    with pytest.raises(ValueError, match="row 7") as told:
        token_row(row, 7, tiny_model(), collate)
    assert said in str(told.value)


def test_what_else_the_model_reads_is_refused_and_what_it_does_not_read_ignored():
    row = SHORT | {"token_type_ids": [0, 0, 0, 0], "text": "abcd"}
    assert token_row(row, 0, tiny_model("llama"), None) == token_row(SHORT, 0, tiny_model(), None)
    with pytest.raises(ValueError, match="row 0 has 'token_type_ids', which the model reads"):
        token_row(row, 0, tiny_model("gpt2"), None)


def test_rows_of_like_length_share_a_batch():
    rows = [token_row(row, i, tiny_model(), None) for i, row in enumerate([SHORT, LONG, SHORT])]
    batches = EncodedExamples(rows, RightPadding(True), 8, forward_tokens=1).batches([0, 1, 2])
    assert [places for places, _ in batches] == [[1], [0, 2]]
