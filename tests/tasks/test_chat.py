import types
from datetime import datetime
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers.utils import chat_template_utils

from grasp_lora.tasks.base import TASKS, Example
from grasp_lora.tasks.chat import chat_frame, plain_frame
from grasp_lora.tasks.encoding import encode, encode_examples
from grasp_lora.tasks.prompts import render
from grasp_lora.tasks.records import Prompt
from helpers import packaged_tokenizer, tiny_tokenizer

PROMPT = Prompt("Text: ", "one two three four five six", "\nQ: which?\nA:")

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<turn>system\nBe kind.</turn>\n' }}{% endif %}"
    "{{ '<turn>' + m['role'] + '\n' + m['content'] + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>assistant\n' }}{% endif %}"
)
# Trims, starts with the start token, names the assistant otherwise.
MODEL = (
    "{{ bos_token }}{% for m in messages %}{{ '<turn>' + ('model' if m['role'] == 'assistant' "
    "else m['role']) + '\n' + m['content'] | trim + '</turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
# No word for the assistant, blanks around the answer, ends on the end token.
BRACKETS = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DATED = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n\n' }}" + CHATML
# The last answer is shown behind empty thinking tags that the generation prompt lacks.
THINKING = CHATML.replace(
    "'\n' + m['content']",
    "'\n' + ('<think>\n\n</think>\n\n' if m['role'] == 'assistant' else '') + m['content']",
)
TEMPLATES = {
    "chatml": CHATML,
    "model": MODEL,
    "brackets": BRACKETS,
    "dated": DATED,
    "thinking": THINKING,
}
ENDS = {name: "<eos>" if name == "brackets" else "</turn>" for name in TEMPLATES}


def chat_tokenizer(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>", "</turn>"]})
    tokenizer.chat_template = template
    return tokenizer


def conversation(prompt: Prompt, answer: str) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": prompt.text},
        {"role": "assistant", "content": answer},
    ]


def rendered(tokenizer: Any, turns: list[dict[str, str]], **settings: Any) -> str:
    """Return the text that the template renders for the fixed date."""
    template = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    return tokenizer.apply_chat_template(turns, tokenize=False, chat_template=template, **settings)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_is_what_the_template_writes_up_to_the_end_of_turn(name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    frame = chat_frame(tokenizer)
    row = encode(PROMPT, "two", tokenizer, 500, frame=frame)
    whole = rendered(tokenizer, conversation(PROMPT, "two"))
    end = whole.rindex(ENDS[name]) + len(ENDS[name])
    expected = tokenizer(whole[:end], add_special_tokens=False)["input_ids"]
    assert list(row.input_ids) == expected
    assert row.input_ids[-1] == frame.end_id == tokenizer.convert_tokens_to_ids(ENDS[name])


@pytest.mark.parametrize("name", ["chatml", "model"])
def test_the_tokenizer_adds_no_start_token_of_its_own(name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    plain = encode(PROMPT, "two", tokenizer, 500, frame=chat_frame(tokenizer))
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", start)]
    )
    assert tokenizer("a")["input_ids"][0] == start
    row = encode(PROMPT, "two", tokenizer, 500, frame=chat_frame(tokenizer))
    assert row.input_ids == plain.input_ids
    assert row.input_ids.count(start) == (name == "model")


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_starts_where_the_template_says(name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    row = encode(PROMPT, "two", tokenizer, 500, frame=chat_frame(tokenizer))
    start = rendered(tokenizer, conversation(PROMPT, "")[:1], add_generation_prompt=True)
    # Empty thinking tags are given to the model: the answer begins right behind them.
    start += "<think>\n\n</think>\n\n" if name == "thinking" else ""
    assert tokenizer.decode(list(row.input_ids[: row.prompt_length])) == start
    answer = tokenizer.decode(list(row.input_ids[row.prompt_length :]), skip_special_tokens=True)
    assert answer.strip() == "two"


# As in Llama 3.2: asked for inside a block, and only where the caller gives no date.
LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%A %d %b %Y, %H:%M') %}{%- endif %}{%- endif %}"
    "{{- 'Today is ' + date_string.strip() + '\n\n' }}"
)


@pytest.mark.parametrize(
    ("template", "date"),
    [
        (DATED, "26 Jul 2024"),
        (LLAMA + CHATML, "Friday 26 Jul 2024, 00:00"),
        ("\n" + DATED, "26 Jul 2024"),
    ],
)
def test_a_template_with_a_date_writes_the_same_prompt_on_every_day(
    monkeypatch, template: str, date: str
) -> None:
    frames = []
    for day in (1, 2):
        clock = types.SimpleNamespace(now=lambda day=day: datetime(2031, 1, day))
        monkeypatch.setattr(chat_template_utils, "datetime", clock)
        tokenizer = chat_tokenizer(template)
        own = tokenizer.apply_chat_template(conversation(PROMPT, "two"), tokenize=False)
        assert f"0{day} Jan 2031" in own, "the clock is not where it was"
        frames.append(chat_frame(tokenizer))
    assert frames[0] == frames[1]
    assert frames[0].before.startswith(own[: own.index("Today")] + f"Today is {date}\n")


def test_a_thinking_tag_opened_for_the_model_only_is_left_out() -> None:
    opened = CHATML.replace(
        "<turn>assistant\n' }}{% endif %}", "<turn>assistant\n<think>' }}{% endif %}"
    )
    assert opened != CHATML
    assert chat_frame(chat_tokenizer(opened)) == chat_frame(chat_tokenizer(CHATML))


def test_without_a_mark_behind_the_answer_the_end_token_is_put_there() -> None:
    bare = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = chat_tokenizer(bare)
    frame = chat_frame(tokenizer)
    assert (frame.after, frame.end_id) == ("", tokenizer.eos_token_id)
    assert frame.between == "\nassistant: "
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end token"):
        chat_frame(tokenizer)


def test_of_two_special_tokens_at_one_place_the_longer_ends_the_answer() -> None:
    tokenizer = chat_tokenizer(CHATML.replace("</turn>", "<end><end_of_turn>"))
    tokens = ["<end>", "<end><end_of_turn>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    assert chat_frame(tokenizer).end_id == tokenizer.convert_tokens_to_ids(tokens[1])


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m['content']", "m['content'] | upper"),
        CHATML.replace("m['content']", "m['content'] + m['content']"),
        "{{ 'hello' }}",
    ],
    ids=["changed", "twice", "never"],
)
def test_a_template_that_does_not_show_a_text_as_it_is_is_refused(template: str) -> None:
    with pytest.raises(
        ValueError, match=r"contains a text [02] times or changes it.*data.chat to false"
    ):
        chat_frame(chat_tokenizer(template))


def test_a_tokenizer_without_chat_template_is_refused_with_what_to_do() -> None:
    examples = [Example("1", "g", "en", {"context": "c", "question": "q"}, ("a",))]
    with pytest.raises(
        ValueError, match="no chat template; set data.chat to false, or use a model"
    ):
        encode_examples(examples, TASKS["qa"], tiny_tokenizer(), 500, chat=True)


@pytest.mark.parametrize("name", ["chatml", "model"])
def test_only_the_end_of_the_body_is_cut_within_a_chat(name: str) -> None:
    tokenizer = chat_tokenizer(TEMPLATES[name])
    frame = chat_frame(tokenizer)
    whole = encode(PROMPT, "two", tokenizer, 500, frame=frame)
    row = encode(PROMPT, "two", tokenizer, len(whole.input_ids) - 9, frame=frame)
    cut = Prompt(PROMPT.prefix, PROMPT.body[: row.body_length], PROMPT.suffix)
    assert 0 < row.body_length < len(PROMPT.body)
    again = encode(cut, "two", tokenizer, 500, frame=frame)
    assert row.input_ids == again.input_ids
    assert row.label_tokens == whole.label_tokens


def test_blanks_around_the_users_words_are_dropped_as_a_trimming_template_would() -> None:
    tokenizer = chat_tokenizer(MODEL)
    frame = chat_frame(tokenizer)
    for prompt in (
        Prompt("\n ", "  a b ", " \n"),
        Prompt("", " a b\n", ""),
        Prompt("a ", "b", " "),
    ):
        row = encode(prompt, " two ", tokenizer, 500, frame=frame)
        assert tokenizer.decode(list(row.input_ids)) == (
            "<bos><turn>user\na b</turn>\n<turn>model\ntwo</turn>"
        )


def test_report_names_the_token_generation_has_to_stop_at() -> None:
    tokenizer = chat_tokenizer(CHATML)
    examples = [Example("1", "g", "en", {"article": "It rained."}, ("Rain",))]
    task = TASKS["summarization"]
    rows, report = encode_examples(examples, task, tokenizer, 500, chat=True)
    assert report.end_id == rows[0].input_ids[-1] == tokenizer.convert_tokens_to_ids("</turn>")
    assert encode_examples(examples, task, tokenizer, 500)[1].end_id == tokenizer.eos_token_id
    assert plain_frame(tokenizer).wrap(PROMPT) == PROMPT


def test_a_turn_end_that_is_not_special_is_no_part_of_an_answer() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("</turn>", special=False, normalized=False)])
    tokenizer.chat_template = CHATML
    fields = {"context": "Paris is nice.", "question": "What?"}
    examples = [Example("1", "g", "en", fields, ("Paris",))]
    (row,), report = encode_examples(examples, TASKS["qa"], tokenizer, 500, chat=True)
    assert row.input_ids[-1] == tokenizer.eos_token_id
    written = tokenizer.decode(list(row.input_ids[row.prompt_length :]), skip_special_tokens=True)
    assert written == "Paris</turn>"
    assert report.answer_in(written) == "Paris"
    assert report.answer_in("Paris</turn>\n<turn>user\nAnd?") == "Paris"
    assert report.answer_in("Paris, nice\n") == "Paris, nice\n"
    (_,), plain = encode_examples(examples, TASKS["qa"], tokenizer, 500)
    assert plain.answer_in(" Paris ") == " Paris "


def test_rows_for_smollm2_are_what_its_own_template_writes() -> None:
    tokenizer = packaged_tokenizer("smollm2")
    fields = {"article": "Mvua kubwa ilinyesha usiku. Barabara zilifungwa."}
    example = Example("1", "g", "sw", fields, ("Mvua yafunga barabara",))
    task = TASKS["summarization"]
    (row,), report = encode_examples([example], task, tokenizer, 500, chat=True)
    ids = tokenizer.apply_chat_template(
        conversation(render(task, example), example.references[0]), return_dict=False
    )
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert [*row.input_ids, *newline] == ids
    assert report.end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_template_that_fails_is_told_with_what_to_do() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(
        ValueError, match=r"fails on a question .*no system turn.* set data.chat to false"
    ):
        chat_frame(tokenizer)
