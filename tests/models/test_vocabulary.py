"""Tokens beyond the embedding are refused by name."""

import json

import pytest

from grasp_lora.models.backbones import ModelSpec, load_backbone, load_tokenizer
from grasp_lora.models.vocabulary import check_tokens
from helpers import BOS_ID, TINY_VOCAB, tiny_backbone_folder, tiny_tokenizer


def test_the_highest_token_is_named_with_its_id_and_the_embedding():
    tokenizer = tiny_tokenizer()
    check_tokens([3, BOS_ID], tokenizer, BOS_ID + 1, "a row")
    check_tokens([], tokenizer, 1, "an empty row")
    with pytest.raises(ValueError, match="has the token") as caught:
        check_tokens(iter([3, BOS_ID, 4]), tokenizer, BOS_ID, "row 'q1'")
    assert str(caught.value).startswith(
        f"row 'q1' has the token '<bos>' with id {BOS_ID}, but the model's embedding has {BOS_ID} "
        f"rows (ids 0 to {BOS_ID - 1}); give the tokenizer that belongs to the model"
    )
    assert "resize_token_embeddings" in str(caught.value)


def test_a_token_that_no_text_uses_is_no_fault(tmp_path):
    folder = tiny_backbone_folder(tmp_path / "base", vocab=BOS_ID + 1)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)
    backbone = load_backbone(ModelSpec(str(folder), device="cpu"))
    assert backbone.vocabulary == BOS_ID + 1 == len(backbone.tokenizer) - 1
    loaded, _, vocabulary, _ = load_tokenizer(ModelSpec(str(folder)))
    assert (len(loaded), vocabulary) == (BOS_ID + 2, BOS_ID + 1)


@pytest.mark.parametrize("named", [TINY_VOCAB, [3, TINY_VOCAB]])
def test_a_token_beyond_the_embedding_cannot_end_an_answer(tmp_path, named):
    folder = tiny_backbone_folder(tmp_path / "base")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": named}))
    for load in (load_backbone, load_tokenizer):
        with pytest.raises(ValueError, match=rf"what ends an answer of .* id {TINY_VOCAB}, but"):
            load(ModelSpec(str(folder), device="cpu"))


def test_a_model_without_generation_settings_ends_with_the_tokenizers_token(tmp_path):
    folder = tiny_backbone_folder(tmp_path / "base")
    (folder / "generation_config.json").unlink()
    assert load_tokenizer(ModelSpec(str(folder)))[2] == TINY_VOCAB
