"""Texts as token ids: many at once, as the tokenizer itself gives them one by one."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from grasp_lora.data.builtin import builtin_examples
from grasp_lora.tasks.fitting import token_counts, token_lists
from helpers import packaged_tokenizer, tiny_tokenizer

TEXTS = [
    "",
    " ",
    "a",
    "Two words\n",
    "<bos>in the text<eos> <|im_end|>",
    "القاهرة مدينة",
    "北京是首都",
    "n 1234 ½ e\u0301",
    *(e.fields["context"] for e in builtin_examples("ar", count=20, seed=0)),
]


class Changing(PreTrainedTokenizerFast):
    """A tokenizer that changes texts before its backend reads them."""

    def _encode_plus(self, text: Any, *given: Any, **settings: Any) -> Any:
        changed = text.upper() if isinstance(text, str) else [one.upper() for one in text]
        return super()._encode_plus(changed, *given, **settings)


def of_kind(kind: str) -> Any:
    if kind == "tiny":
        return tiny_tokenizer()
    if kind == "changing":
        backend = tiny_tokenizer().backend_tokenizer
        return Changing(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
    return packaged_tokenizer(kind)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", ["tiny", "changing", "smollm2", "gemma3-270m"])
def test_many_texts_have_the_tokens_that_each_has_alone(kind: str, special: bool) -> None:
    tokenizer = of_kind(kind)
    # What a tokenizer's file says on length is not meant for rows, which are cut afterwards.
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=12)
    for texts in (TEXTS, TEXTS[::-1], TEXTS[:1], []):
        found = token_lists(tokenizer, texts, special)
        alone = [
            tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
            for text in texts
        ]
        assert found == alone
        if not special:
            assert token_counts(tokenizer, texts) == [len(ids) for ids in alone]


def test_special_tokens_in_texts_are_split_where_the_tokenizer_splits_them() -> None:
    tokenizer = tiny_tokenizer()
    whole = token_counts(tokenizer, ["a<eos>", "b<eos>"])
    tokenizer.split_special_tokens = True
    assert (whole, token_counts(tokenizer, ["a<eos>", "b<eos>"])) == ([2, 2], [6, 6])
