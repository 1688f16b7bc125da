from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import grasp_lora.tasks.encoding as encoding_module
from grasp_lora.data.builtin import builtin_examples
from grasp_lora.tasks.base import TASKS
from grasp_lora.tasks.encoding import Encoding, encode_examples
from grasp_lora.tasks.records import Example
from helpers import tiny_tokenizer


def test_report_adds_up_what_was_cut() -> None:
    tokenizer = tiny_tokenizer()
    examples = builtin_examples("es", count=30, seed=0)
    whole, full = encode_examples(examples, TASKS["qa"], tokenizer, 2000)
    assert (full.rows, full.truncated, full.cut_tokens_total) == (30, 0, 0)
    limit = full.longest - 20
    rows, report = encode_examples(examples, TASKS["qa"], tokenizer, limit)
    pairs = list(zip(whole, rows, strict=True))
    assert report.truncated == sum(len(a.input_ids) > limit for a, _ in pairs) > 0
    assert report.cut_tokens_total == sum(a.prompt_length - b.prompt_length for a, b in pairs)
    assert report.longest == max(len(b.input_ids) for b in rows) <= limit
    assert report.label_tokens == sum(len(e.references[0].encode()) + 2 for e in examples)
    assert encode_examples([], TASKS["qa"], tokenizer, 100)[1].longest == 0


def test_report_gives_the_mean_share_of_the_body_that_was_lost() -> None:
    # One token a byte: prompt "|", body, answer " z" and the end token.
    bodies = ["a" * 100, "b" * 50, "c" * 10]
    examples = [Example(b[0], b[0], "en", {"text": b}, ("z",)) for b in bodies]
    task = TASKS["text-to-text"]
    _, report = encode_examples(examples, task, tiny_tokenizer(), 29, "{text}|")
    # 25 tokens are left for a body: 75 of 100 and 25 of 50 are lost, the third row fits.
    assert (report.truncated, report.cut_tokens_total) == (2, 100)
    assert report.cut_share == pytest.approx((0.75 + 0.5) / 2)
    assert encode_examples(examples, task, tiny_tokenizer(), 500, "{text}|")[1].cut_share == 0.0
    everything = encode_examples(examples[:1], task, tiny_tokenizer(), 4, "{text}|")[1]
    assert everything.cut_share == 1.0


def test_report_counts_rows_whose_answers_were_all_cut_off() -> None:
    context = "Anna came first. " + "Nothing happened. " * 10 + "Zoe came last."
    references = {
        "kept": ("Anna",),
        "lost": ("Zoe",),
        "one of two kept": ("Zoe", "Anna"),
        "both lost": ("Zoe", "came last"),
        "lost, another never there": ("Zoe", "Eve"),
        "never there": ("Eve",),
    }
    examples = [
        Example(name, "g", "en", {"context": context, "question": "Who?"}, answers)
        for name, answers in references.items()
    ]
    _, report = encode_examples(examples, TASKS["qa"], tiny_tokenizer(), 200)
    assert report.truncated == len(examples)
    assert report.answers_lost == 3
    context = "القـاهرة " + "مدينة " * 40 + "ﺩﻣﺸﻖ"
    fields = {"context": context, "question": "?"}
    arabic = [Example(name, "g", "ar", fields, (name,)) for name in ("القاهرة", "دمشق")]
    assert encode_examples(arabic, TASKS["qa"], tiny_tokenizer(), 300)[1].answers_lost == 1
    assert encode_examples(examples, TASKS["qa"], tiny_tokenizer(), 500)[1].answers_lost == 0


@pytest.mark.parametrize(
    ("language", "bodies", "fertility", "unit"),
    [
        ("en", ["ab  cd\nefgh"], 11 / 3, "word"),
        # Three bytes a character; the blank costs a token and is no character.
        ("zh", ["北京 是"], 10 / 3, "character"),
        ("zh-TW", ["北京"], 3.0, "character"),
        ("th", ["กขค"], 3.0, "character"),
        # Each text counts once, however many rows it has.
        ("sw", ["maji", "maji", "a b"], (4 + 3) / 3, "word"),
        ("en", [" "], None, "word"),
    ],
)
def test_fertility_is_tokens_per_word_or_character_of_the_whole_bodies(
    language: str, bodies: list[str], fertility: float | None, unit: str
) -> None:
    examples = [Example(str(i), "g", language, {"t": b}, ("z",)) for i, b in enumerate(bodies)]
    for max_length in (100, 8):
        encoding = Encoding(TASKS["text-to-text"], tiny_tokenizer(), max_length, "{t}>")
        assert len(list(encoding.rows(examples))) == len(examples)
        assert encoding.fertility() == (fertility and pytest.approx(fertility), unit, None)


def test_fertility_of_many_texts_is_that_of_some_drawn_at_random(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoding_module, "COUNTED", 50)
    # One byte is one token, so a word of n letters takes n tokens.
    bodies = ["a" * (1 + number % 9) + str(number) for number in range(1000)]
    examples = [Example(str(i), "g", "en", {"t": b}, ("z",)) for i, b in enumerate(bodies)]
    encoding = Encoding(TASKS["text-to-text"], tiny_tokenizer(), 100, "{t}>")
    assert len(list(encoding.rows(examples))) == 1000
    found, unit, drawn = encoding.fertility()
    assert (unit, drawn) == ("word", 50)
    assert found == encoding.fertility()[0]
    lengths = [len(body) for body in bodies]
    error = stdev(lengths) / 50**0.5
    assert 0 < abs(found - fmean(lengths)) < 4 * error


def test_no_rows_give_an_empty_report() -> None:
    rows, report = encode_examples([], TASKS["qa"], tiny_tokenizer(), 100)
    assert rows == []
    assert (report.rows, report.answers_lost, report.cut_share) == (0, 0, 0)
    assert Encoding(TASKS["qa"], tiny_tokenizer(), 100).fertility() == (None, "word", None)


def test_rows_are_tokenised_many_at_a_time_as_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "_AT_ONCE", 16)
    examples = builtin_examples("es", count=40, seed=0)
    examples += [replace(one, id=f"{one.id} again") for one in examples[:5]]
    alone = [encode_examples([one], TASKS["qa"], tiny_tokenizer(), 250) for one in examples]
    encoding = Encoding(TASKS["qa"], tiny_tokenizer(), 250)
    assert list(encoding.rows(examples)) == [row for rows, _ in alone for row in rows]
    report = encoding.report()
    assert 0 < report.truncated == sum(one.truncated for _, one in alone) < len(examples)
    assert report.cut_tokens_total == sum(one.cut_tokens_total for _, one in alone)
    assert report.answers_lost == sum(one.answers_lost for _, one in alone) > 0


def test_rows_are_read_as_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_module, "_AT_ONCE", 4)
    calls: list[int] = []

    class Counted(PreTrainedTokenizerFast):
        def __call__(self, text: Any, **options: Any) -> Any:
            calls.append(len(text))
            return super().__call__(text, **options)

    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Counted
    rows = Encoding(TASKS["qa"], tokenizer, 2000).rows(builtin_examples("es", count=12, seed=0))
    next(rows)
    # Prompts, the ends of prompts, and answers behind them; no text is tokenised by itself.
    assert calls == [4, 4, 4]
    assert len(list(rows)) == 11
    assert calls == [4] * 9
