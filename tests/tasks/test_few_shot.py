"""Prompts with solved examples ahead: which are taken, how they are written, where answers end."""

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from grasp_lora.data.builtin import builtin_examples
from grasp_lora.tasks.base import TASKS, Example
from grasp_lora.tasks.chat import few_shot_frames
from grasp_lora.tasks.encoding import encode_examples
from grasp_lora.tasks.few_shot import asked_after, before_next, draw_order, solved_examples
from grasp_lora.tasks.prompts import first_words, render
from helpers import BOS_ID, packaged_tokenizer, tiny_tokenizer
from tasks.test_chat import CHATML, TEMPLATES, chat_tokenizer, rendered

QA = TASKS["qa"]


def example(number: int, group: str | None = None, words: int = 3) -> Example:
    fields = {"context": f"Text {number}." + " so" * words, "question": f"Who is {number}?"}
    return Example(f"q{number}", group or f"g{number}", "en", fields, (f"number {number}",))


def asked(
    examples: Sequence[Example], tokenizer: Any, chat: bool = False, length: int = 500
) -> Any:
    """Return the solved examples, and the last example asked after the others."""
    rows, _ = encode_examples(examples, QA, tokenizer, length, chat=chat)
    frames = few_shot_frames(tokenizer, chat)
    prompts = [render(QA, one) for one in examples]
    parts = [(r, p, e.references[0]) for r, p, e in zip(rows, prompts, examples, strict=True)]
    solved = solved_examples(parts[:-1], tokenizer, frames)
    return solved, asked_after(solved, rows[-1], prompts[-1], tokenizer, frames.last), rows[-1]


def test_every_context_gives_one_example_before_any_gives_a_second():
    rows = [example(n, group=f"g{n % 3}") for n in range(9)]
    order = draw_order(rows, seed=5)
    assert sorted(one.id for one in order) == sorted(one.id for one in rows)
    for turn in range(3):
        assert {one.group for one in order[3 * turn : 3 * turn + 3]} == {"g0", "g1", "g2"}
    assert draw_order(rows[::-1], seed=5) == order, "the order of the rows does not matter"
    assert len({draw_order(rows, seed)[0].id for seed in range(9)}) > 1


def test_contexts_of_unequal_size_are_all_drawn():
    rows = [example(n, group="big" if n < 5 else f"g{n}") for n in range(7)]
    order = draw_order(rows, seed=1)
    assert {one.group for one in order[:3]} == {"big", "g5", "g6"}
    assert {one.group for one in order[3:]} == {"big"}


def test_solved_examples_are_written_as_lm_eval_writes_them():
    tokenizer, rows = tiny_tokenizer(), [example(n) for n in range(4)]
    _, found, alone = asked(rows, tokenizer)
    # Reference: every prompt, a space and its answer, a blank line after each, then the question.
    texts = [f"{render(QA, one).text} {one.references[0]}" for one in rows]
    prompt = "\n\n".join([*texts[:-1], render(QA, rows[-1]).text])
    assert tokenizer.decode(found.input_ids[: found.prompt_length]) == prompt
    # The answer has the tokens that it has alone; a line break ends it, as it ends the solved ones.
    assert found.label_tokens == alone.label_tokens
    assert tokenizer.decode(found.input_ids[found.prompt_length :]) == " number 3\n"
    assert (found.id, found.group) == ("q3", "g3")


def test_solved_examples_are_cut_as_training_rows_are():
    tokenizer, rows = tiny_tokenizer(), [example(n, words=40) for n in range(3)]
    solved, found, _ = asked(rows, tokenizer, length=140)
    encoded, _ = encode_examples(rows, QA, tokenizer, 140)
    assert all(one.cut_tokens for one in encoded)
    for one, row in zip(solved, encoded, strict=False):
        assert tokenizer.decode(list(row.input_ids[:-1])) == one.text.removeprefix("\n\n")
    assert len(found.input_ids) == sum(len(one.ids) for one in solved) + len("\n\n") + 140


@pytest.mark.parametrize("name", TEMPLATES)
def test_in_a_chat_solved_examples_are_earlier_turns(name):
    tokenizer, rows = chat_tokenizer(TEMPLATES[name]), [example(n) for n in range(4)]
    _, found, alone = asked(rows, tokenizer, chat=True)
    turns: list[dict[str, str]] = []
    for one in rows:
        turns.append({"role": "user", "content": render(QA, one).text})
        turns.append({"role": "assistant", "content": one.references[0]})
    whole = rendered(tokenizer, turns)
    text = tokenizer.decode(found.input_ids)
    assert whole.startswith(text)
    assert whole[len(text) :].strip() == "", "the end of the last turn is the end of the row"
    assert found.input_ids == tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert found.input_ids[found.prompt_length :] == alone.input_ids[alone.prompt_length :]


def test_earlier_answers_may_lack_what_only_the_last_one_has():
    think = "{{ '<think>\n\n</think>\n\n' if m['role'] == 'assistant' and loop.last else '' }}"
    template = CHATML.replace(
        "{{ '<turn>' + m['role'] + '\n' + m['content'] + '</turn>\n' }}",
        "{{ '<turn>' + m['role'] + '\n' }}" + think + "{{ m['content'] + '</turn>\n' }}",
    )
    tokenizer, rows = chat_tokenizer(template), [example(n) for n in range(3)]
    _, found, _ = asked(rows, tokenizer, chat=True)
    text = tokenizer.decode(found.input_ids)
    assert text.count("<think>") == 1
    assert text.endswith("<think>\n\n</think>\n\nnumber 2</turn>")


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m['content'] +", "loop.index|string + m['content'] +"),
        CHATML.replace("{% for m in messages %}", "{% for m in messages[-2:] %}"),
    ],
    ids=["numbered", "forgetful"],
)
def test_a_template_without_a_place_for_earlier_turns_is_refused(template):
    with pytest.raises(ValueError, match=r"turns of a conversation alike|0 times"):
        few_shot_frames(chat_tokenizer(template), chat=True)


@pytest.mark.parametrize("name", ["smollm2", "gemma3-270m"])
def test_tokens_are_those_of_the_whole_text(name):
    tokenizer = packaged_tokenizer(name)
    rows = [one for one in builtin_examples("es") if one.references[0][-1].isalnum()][:5]
    _, found, _ = asked(rows, tokenizer, length=1000)
    prompt = list(found.input_ids[: found.prompt_length])
    assert prompt == tokenizer(tokenizer.decode(prompt, skip_special_tokens=True))["input_ids"]
    assert tokenizer.decode([found.input_ids[-1]])[0] == "\n"


def test_the_first_solved_example_has_the_start_token_alone():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS_ID)]
    )
    _, found, _ = asked([example(n) for n in range(3)], tokenizer)
    assert found.input_ids[0] == BOS_ID
    assert found.input_ids.count(BOS_ID) == 1


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (" Paris", " Paris"),
        (" Paris\n\nText: A city.", " Paris"),
        ("\n\nAnswer with words from the text.\nText:", ""),
        (" one\ntwo\n \t\nthree", " one\ntwo"),
        (" one\nText: A city.", " one"),
        (" one\n  Question: Why?", " one"),
        ("Text: it says so", "Text: it says so"),
        (" the Text: of it", " the Text: of it"),
        ("\nParis\n", "\nParis\n"),
    ],
)
def test_an_answer_ends_where_the_next_example_begins(text, kept):
    assert before_next(text, ("Text:", "Question:", "")) == kept


def test_without_first_words_only_a_blank_line_ends_an_answer():
    assert before_next("a\nb\n\nc", ("",)) == "a\nb"
    assert before_next("a\nb", ()) == "a\nb"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{prompt}", ""),
        ("Question: {asked}\nAnswer:", "Question:"),
        ("Do this.\n\nInput: {text}\n{more}", "Do this."),
        (" \n Say {text}", "Say"),
    ],
)
def test_the_first_words_of_a_template(template, words):
    assert first_words(TASKS["text-to-text"], template) == words


def test_the_first_words_of_a_task():
    assert first_words(QA, QA.prompts["en"]) == "Answer with words from the text."
