from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import PreTrainedTokenizerFast
from transformers.models.m2m_100 import modeling_m2m_100

from architectures import ENCODER_DECODERS, Architecture, spanish_questions, t5_tokenizer
from grasp_lora.data.builtin import builtin_examples
from grasp_lora.tasks.base import TASKS
from grasp_lora.tasks.chat import Frame
from grasp_lora.tasks.encoding import (
    IGNORED,
    Collator,
    EncodedExample,
    Encoding,
    PackingCollator,
    TooLong,
    TwoSidedCollator,
    encode,
    encode_examples,
)
from grasp_lora.tasks.prompts import render
from grasp_lora.tasks.records import Example, Prompt
from grasp_lora.training.trainer import answer_loss
from helpers import EOS_ID, packaged_tokenizer, tiny_model, tiny_tokenizer

PROMPT = Prompt("Text: ", "one two three four five six", "\nQ: which?\nA:")


@dataclass
class WordTokenizer:
    """A slow tokenizer without offsets, with one token for every three characters."""

    eos_token_id: int | None = 1
    is_fast: bool = False

    def __call__(
        self, text: str | list[str], add_special_tokens: bool, **settings: Any
    ) -> dict[str, Any]:
        assert "return_offsets_mapping" not in settings
        if not isinstance(text, str):
            alone = [self(one, add_special_tokens, **settings) for one in text]
            return {"input_ids": [one["input_ids"] for one in alone]}
        ids = [10 + sum(map(ord, text[i : i + 3])) for i in range(0, len(text), 3)]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}


def with_specials(single: str) -> Any:
    """Return the byte tokenizer with start and end tokens as in the template `single`."""
    tokenizer = tiny_tokenizer()
    marks = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=marks
    )
    return tokenizer


def text_of(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True)


def test_a_prompt_that_fits_is_tokenised_whole_and_the_answer_apart() -> None:
    tokenizer = tiny_tokenizer()
    row = encode(PROMPT, "two", tokenizer, 200, example_id="q", group="g")
    prompt = tokenizer(PROMPT.text)["input_ids"]
    answer = tokenizer(" two", add_special_tokens=False)["input_ids"]
    assert list(row.input_ids) == [*prompt, *answer, tokenizer.eos_token_id]
    assert row.prompt_length == len(prompt)
    assert row.label_tokens == len(answer) + 1
    assert (row.id, row.group, row.cut_tokens) == ("q", "g", 0)


@pytest.mark.parametrize("single", ["<bos> $A", "$A", "<bos> $A <eos>", "$A <eos>"])
def test_the_start_token_is_kept_and_an_added_end_token_is_not(single: str) -> None:
    tokenizer = with_specials(single)
    row = encode(PROMPT, "two", tokenizer, 200)
    ids = list(row.input_ids)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.bos_token_id) == single.count("<bos>")
    assert (ids[0] == tokenizer.bos_token_id) == single.startswith("<bos>")


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), WordTokenizer()], ids=["fast", "slow"])
def test_only_the_end_of_the_context_is_cut_and_no_more_than_needed(tokenizer: Any) -> None:
    whole = encode(PROMPT, "two", tokenizer, 500)
    shortest = len(
        encode(Prompt(PROMPT.prefix, "", PROMPT.suffix), "two", tokenizer, 500).input_ids
    )
    for max_length in range(shortest + 1, len(whole.input_ids)):
        row = encode(PROMPT, "two", tokenizer, max_length)
        assert len(row.input_ids) <= max_length
        assert row.cut_tokens == len(whole.input_ids) - len(row.input_ids) > 0
        assert row.label_tokens == whole.label_tokens
        # A blank or a part of a token at the cut is all that may be lost beyond the need.
        assert max_length - len(row.input_ids) <= 1
        ends = range(len(PROMPT.body) + 1)
        starts = [PROMPT.prefix + PROMPT.body[:end].rstrip() + PROMPT.suffix for end in ends]
        prompts = [
            tuple(tokenizer(start, add_special_tokens=True)["input_ids"]) for start in starts
        ]
        assert row.input_ids[: row.prompt_length] in prompts


def test_a_cut_never_splits_a_character_of_many_bytes() -> None:
    tokenizer = tiny_tokenizer()
    prompt = Prompt("文：", "北京是中国的首都" * 3, "问？")
    whole = len(encode(prompt, "北京", tokenizer, 500).input_ids)
    for max_length in range(whole - 30, whole):
        row = encode(prompt, "北京", tokenizer, max_length)
        text = text_of(tokenizer, row.input_ids[: row.prompt_length])
        assert "\ufffd" not in text
        assert text.startswith("文：北京")
        assert text.endswith("问？")
        assert max_length - len(row.input_ids) < 3


def test_what_cannot_fit_is_refused_with_its_id_and_the_lengths() -> None:
    tokenizer = tiny_tokenizer()
    least = len(tokenizer(PROMPT.prefix + PROMPT.suffix)["input_ids"]) + len(" two") + 1
    assert encode(PROMPT, "two", tokenizer, least).cut_tokens > 0
    with pytest.raises(ValueError, match=rf"row 'q7' does not fit.*at least {least}"):
        encode(PROMPT, "two", tokenizer, least - 1, example_id="q7")


def test_room_kept_for_generation_makes_the_cut_independent_of_the_answer() -> None:
    tokenizer = tiny_tokenizer()
    cuts = [encode(PROMPT, answer, tokenizer, 50, reserve=12) for answer in ("two", "five six")]
    assert cuts[0].input_ids[: cuts[0].prompt_length] == cuts[1].input_ids[: cuts[1].prompt_length]
    assert cuts[0].prompt_length <= 50 - 12
    without = encode(PROMPT, None, tokenizer, 50, reserve=12)
    assert without.input_ids == cuts[0].input_ids[: cuts[0].prompt_length]
    assert without.label_tokens == 0


def test_a_tokenizer_without_end_token_and_an_empty_prompt_are_refused() -> None:
    with pytest.raises(ValueError, match="no end token"):
        encode(PROMPT, "two", WordTokenizer(eos_token_id=None), 100)
    with pytest.raises(ValueError, match="row 'q' *: the prompt is empty"):
        encode(Prompt("", "", ""), "two", with_specials("$A"), 100, example_id="q")


def test_evaluation_rows_leave_room_to_generate() -> None:
    task = TASKS["qa"]
    example = Example("1", "g", "en", {"context": "x " * 300, "question": "y?"}, ("z",))
    (row,), _ = encode_examples([example], task, tiny_tokenizer(), 200, for_training=False)
    assert row.prompt_length <= 200 - task.max_new_tokens - 1
    (row,), _ = encode_examples([example], task, tiny_tokenizer(), 200)
    assert len(row.input_ids) >= 199


def test_the_room_to_generate_can_be_set_and_follows_the_language_otherwise() -> None:
    task = TASKS["summarization"]

    def prompt_length(language: str, new_tokens: int | None) -> int:
        example = Example("1", "g", language, {"article": "x" * 900}, ("z",))
        rows, _ = encode_examples(
            [example],
            task,
            tiny_tokenizer(),
            400,
            for_training=False,
            new_tokens=new_tokens,
        )
        return rows[0].prompt_length

    assert prompt_length("en", None) == 400 - 96 - 1
    assert prompt_length("ar", None) == 400 - 128 - 1
    assert prompt_length("ar", 10) == 400 - 10 - 1


def test_an_answer_is_never_cut_however_long() -> None:
    answer = "a very long answer " * 15
    example = Example("1", "g", "en", {"article": "x" * 900}, (answer,))
    (row,), _ = encode_examples([example], TASKS["summarization"], tiny_tokenizer(), 400)
    assert row.label_tokens == len(" " + answer) + 1
    with pytest.raises(ValueError, match="row '1' does not fit"):
        encode_examples([example], TASKS["summarization"], tiny_tokenizer(), 330)


def test_examples_that_cannot_fit_are_left_out_and_counted() -> None:
    def example(name: str, asked: str) -> Example:
        return Example(name, name, "en", {"context": "x " * 300, "question": asked}, ("z",))

    examples = [example("a", "y?"), example("b", "y" * 400), example("c", "y?"),
                example("d", "y" * 500)]  # fmt: skip
    rows, report = encode_examples(examples, TASKS["qa"], tiny_tokenizer(), 200)
    assert [row.id for row in rows] == ["a", "c"]
    assert rows == encode_examples(examples[::2], TASKS["qa"], tiny_tokenizer(), 200)[0]
    assert (report.rows, report.left_out, report.truncated) == (2, ("b", "d"), 2)
    (longest,), _ = encode_examples(examples[3:], TASKS["qa"], tiny_tokenizer(), report.needed)
    assert longest.body_length == 0
    with pytest.raises(TooLong, match="row 'b' does not fit"):
        encode_examples(examples[1:2], TASKS["qa"], tiny_tokenizer(), 200)
    with pytest.raises(TooLong, match="row 'd' does not fit"):
        encode_examples(examples[3:], TASKS["qa"], tiny_tokenizer(), report.needed - 1)


def test_the_cut_is_found_with_few_tokenisations_of_the_prompt() -> None:
    tokenizer, calls = tiny_tokenizer(), 0

    class Counted:
        eos_token_id, is_fast = tokenizer.eos_token_id, True

        def __call__(self, text: str | list[str], **settings: Any) -> Any:
            nonlocal calls
            calls += sum(len(one) > 500 for one in ([text] if isinstance(text, str) else text))
            return tokenizer(text, **settings)

    prompt = Prompt("Text: ", "Kila mtu ana haki ya kuishi. " * 120, "\nA:")
    row = encode(prompt, "ndiyo", Counted(), 1000)
    assert len(row.input_ids) in (999, 1000)
    # The whole prompt, the cut points, and about three tries.
    assert 3 <= calls <= 6


def test_an_answer_is_tokenised_as_what_follows_the_prompt() -> None:
    # A tokenizer that puts a space ahead of each text, as older sentencepiece ones do.
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=True, use_regex=False
    )
    assert text_of(tokenizer, tokenizer("two")["input_ids"]) == " two"
    row = encode(PROMPT, "two", tokenizer, 200)
    assert list(row.input_ids[:-1]) == tokenizer(PROMPT.text + " two")["input_ids"]
    frame = Frame("", "", "", "", EOS_ID, chat=True)
    row = encode(PROMPT, "two", tokenizer, 200, frame=frame)
    assert list(row.input_ids[:-1]) == tokenizer(PROMPT.text + "two")["input_ids"]


@pytest.mark.parametrize("name", ["qa", "summarization"])
def test_behind_every_built_in_prompt_the_answer_follows_a_space(name: str) -> None:
    task, tokenizer = TASKS[name], tiny_tokenizer()
    for language in task.prompts:
        fields = dict.fromkeys(task.fields, "Riga.")
        prompt = render(task, Example("1", "g", language, fields, ("two",)))
        row = encode(prompt, "two", tokenizer, 500)
        assert list(row.input_ids) == [*tokenizer(prompt.text + " two")["input_ids"], EOS_ID]
        assert list(row.input_ids[: row.prompt_length]) == tokenizer(prompt.text)["input_ids"]


@pytest.mark.parametrize(
    ("prompt", "answer", "written"),
    [
        ("### Response:\n", "Paris", "Paris"),
        ("Q: which?\nA: ", "Paris", "Paris"),
        ("答案：\u3000", "北京", "北京"),
        ("Word:", " Paris", " Paris"),
        ("Word:", "\nParis", "\nParis"),
        ("Word:\n", " Paris", " Paris"),
        ("Word:", "Paris", " Paris"),
    ],
)
@pytest.mark.parametrize("prefix_space", [False, True])
def test_a_space_parts_prompt_and_answer_unless_one_of_them_brings_white_space(
    prompt: str, answer: str, written: str, prefix_space: bool
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=prefix_space, use_regex=False
    )
    row = encode(Prompt(prompt, "", ""), answer, tokenizer, 200)
    assert text_of(tokenizer, row.input_ids).strip() == (prompt + written).strip()
    assert list(row.input_ids[: row.prompt_length]) == tokenizer(prompt)["input_ids"]
    assert text_of(tokenizer, row.input_ids[row.prompt_length :]) == written


def test_a_word_behind_white_space_is_the_token_a_model_knows_for_it() -> None:
    tokenizer = packaged_tokenizer("smollm2")

    def answer(prompt: str) -> list[str]:
        row = encode(Prompt(prompt, "", ""), "Paris", tokenizer, 200)
        return tokenizer.convert_ids_to_tokens(list(row.input_ids[row.prompt_length : -1]))

    assert answer("### Response:\n") == answer("A: ") == ["Paris"]
    assert answer("Answer:") == ["ĠParis"]


def test_a_space_at_the_end_of_a_prompt_is_not_written_twice() -> None:
    # "▁Paris" is one token, and every text gets a "▁" ahead.
    letters = {letter: i for i, letter in enumerate("▁Paris:\n")}
    merges = [("▁", "P"), ("▁P", "a"), ("▁Pa", "r"), ("▁Par", "i"), ("▁Pari", "s")]
    vocab = letters | {a + b: len(letters) + i for i, (a, b) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab | {"</s>": len(vocab)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    row = encode(Prompt("P: ", "", ""), "Paris", fast, 200)
    written = fast.convert_ids_to_tokens(list(row.input_ids[row.prompt_length : -1]))
    assert written == ["P", "a", "r", "i", "s"]


def rows_for_batch(pad: int) -> list[EncodedExample]:
    # Prompt, answer and end token all hold the padding id.
    return [
        EncodedExample("a", "g", (5, pad, 6, pad, pad), 3, 0),
        EncodedExample("b", "g", (7, 8, pad), 1, 0),
        EncodedExample("c", "g", (9, 4, 3, 2, 6, pad), 5, 0),
    ]


def test_batch_is_padded_left_and_labels_are_the_answers_even_if_they_are_the_pad_token() -> None:
    batch = Collator(pad_id=1)(rows_for_batch(1))
    assert next(iter(batch)) == "input_ids"
    assert batch["input_ids"].tolist() == [
        [1, 5, 1, 6, 1, 1],
        [1, 1, 1, 7, 8, 1],
        [9, 4, 3, 2, 6, 1],
    ]
    assert batch["attention_mask"].tolist() == [
        [0, 1, 1, 1, 1, 1],
        [0, 0, 0, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    assert batch["position_ids"].tolist() == [
        [0, 0, 1, 2, 3, 4],
        [0, 0, 0, 0, 1, 2],
        [0, 1, 2, 3, 4, 5],
    ]
    i = IGNORED
    assert batch["labels"].tolist() == [[i, i, i, i, 1, 1], [i, i, i, i, 8, 1], [i] * 5 + [1]]
    # K = 2, L = 6: the logits at 3 and 4 predict the last two tokens.
    assert batch["logits_to_keep"].tolist() == [3, 4]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_batch_leaves_out_what_a_model_does_not_take() -> None:
    batch = Collator(0, with_position_ids=False, with_logits_to_keep=False)(rows_for_batch(1))
    assert list(batch) == ["input_ids", "attention_mask", "labels"]


def test_batches_without_rows_or_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        Collator(0)([])
    with pytest.raises(ValueError, match="row 'x' has no answer"):
        Collator(0)([*rows_for_batch(1), EncodedExample("x", "g", (1, 2), 2, 0)])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_loss_of_a_row_does_not_depend_on_its_batch(arch: str) -> None:
    model = tiny_model(arch).eval()
    tokenizer = tiny_tokenizer()
    examples = builtin_examples("en", count=5, seed=1)
    rows, _ = encode_examples(examples, TASKS["qa"], tokenizer, 512)
    collate = Collator(EOS_ID)

    def losses(chosen: list[EncodedExample]) -> torch.Tensor:
        batch = collate(chosen)
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        wanted = labels[:, -logits.shape[1] :]
        each = functional.cross_entropy(
            logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
        )
        return each.sum(1) / (wanted != IGNORED).sum(1)

    def alone(row: EncodedExample) -> torch.Tensor:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, row.prompt_length - 1 : -1]
        return functional.cross_entropy(logits, ids[0, row.prompt_length :])

    expected = torch.stack([alone(row) for row in rows])
    torch.testing.assert_close(losses(rows), expected, atol=1e-5, rtol=1e-5)


def test_a_packed_batch_has_no_padding_and_the_labels_of_each_example() -> None:
    batch = PackingCollator()(rows_for_batch(1))
    assert batch["input_ids"].tolist() == [[5, 1, 6, 1, 1, 7, 8, 1, 9, 4, 3, 2, 6, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4, 5]]
    assert batch["logits_to_keep"].tolist() == [2, 3, 5, 6, 12]
    assert batch["labels"].tolist() == [[IGNORED] * 9 + [1, 1, 8, 1, 1]]
    with pytest.raises(ValueError, match="row 'x' has no answer"):
        PackingCollator()([EncodedExample("x", "g", (1, 2), 2, 0)])


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_the_summed_loss_of_a_packed_batch_is_that_of_a_padded_one(arch: str) -> None:
    model = tiny_model(arch).eval()
    rows, _ = encode_examples(
        builtin_examples("en", count=4, seed=1), TASKS["qa"], tiny_tokenizer(), 512
    )

    def loss(collate: Any) -> torch.Tensor:
        batch = collate(rows)
        labels = batch.pop("labels")
        with torch.no_grad():
            # transformers tells packed examples apart only where nothing is cached
            return answer_loss(model(**batch, use_cache=False), labels)

    torch.testing.assert_close(loss(PackingCollator()), loss(Collator(EOS_ID)))


def shifted_right(model: Any, labels: torch.Tensor) -> torch.Tensor:
    """Return what transformers lets the decoder of a model read for labels."""
    if model.config.model_type == "m2m_100":
        return modeling_m2m_100.shift_tokens_right(labels, 1, 2)
    return model.prepare_decoder_input_ids_from_labels(labels)


@pytest.mark.parametrize("one", ENCODER_DECODERS, ids=lambda one: one.name)
def test_both_sides_are_written_as_the_tokenizer_writes_them(one: Architecture):
    model = one.model()
    for asked in spanish_questions(one):
        row = asked.row
        assert row.input_ids[: row.prompt_length] == asked.prompt
        answer, start = row.input_ids[row.prompt_length :], row.sides.start
        batch = TwoSidedCollator(model.config.pad_token_id)([row])
        shifted = shifted_right(model, torch.tensor([asked.target]))
        size = batch["decoder_input_ids"].shape[1]
        assert batch["decoder_input_ids"].equal(shifted[:, :size])
        assert shifted.shape[1] - size == len(asked.target) - (len(start) - 1 + len(answer))
        assert batch["labels"].tolist() == [[IGNORED] * len(start) + list(answer)]
        assert answer[-1] == one.tokenizer().eos_token_id


def test_each_side_is_padded_on_the_right_by_itself():
    one = ENCODER_DECODERS[0]
    rows = [asked.row for asked in spanish_questions(one)]
    batch = TwoSidedCollator(pad_id=0)(rows)
    for index, row in enumerate(rows):
        read, written = row.prompt_length, row.label_tokens
        assert batch["input_ids"][index, :read].tolist() == list(row.input_ids[:read])
        assert batch["attention_mask"][index].sum() == read
        assert batch["decoder_attention_mask"][index].sum() == written
        assert batch["labels"][index, 1 : written + 1].tolist() == list(row.input_ids[read:])
        assert (batch["labels"][index] != IGNORED).sum() == written
    assert batch["labels"].shape[1] == batch["decoder_input_ids"].shape[1] + 1
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    with pytest.raises(ValueError, match="row 'a' has no answer"):
        TwoSidedCollator(0)([EncodedExample("a", "a", (1, 2), 2, 0)])


def test_a_long_prompt_of_an_encoder_decoder_keeps_its_end_and_its_answer():
    example = Example("q", "q", "es", {"context": "uno " * 90, "question": "cual?"}, ("uno",))
    encoding = Encoding(TASKS["qa"], t5_tokenizer(), 150, decoder_start=0)
    (row,) = encoding.rows([example])
    assert len(row.input_ids) <= 150
    assert row.cut_tokens > 0
    assert row.input_ids[row.prompt_length - 1] == 1, "the end token behind the prompt"
    asked = t5_tokenizer().decode(row.input_ids[: row.prompt_length])
    assert asked.endswith("Pregunta: cual? Respuesta:</s>")
    short = Encoding(TASKS["qa"], t5_tokenizer(), 40, decoder_start=0)
    with pytest.raises(TooLong) as told:
        list(short.rows([example]))
    (fits,) = Encoding(TASKS["qa"], t5_tokenizer(), told.value.needed, decoder_start=0).rows(
        [example]
    )
    assert fits.body_length == 0


def test_an_encoder_decoder_has_no_chat():
    with pytest.raises(ValueError, match="no turns of a chat.*set data.chat to false"):
        Encoding(TASKS["qa"], t5_tokenizer(), 100, chat=True, decoder_start=0)
