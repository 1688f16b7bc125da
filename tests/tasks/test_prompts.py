import unicodedata

import pytest

from grasp_lora.tasks.base import TASKS, Example
from grasp_lora.tasks.prompts import (
    QA_PROMPTS,
    SUMMARY_PROMPTS,
    check_template,
    optional_fields,
    render,
    template_fields,
    template_for,
    without_fields,
)

QA, SUMMARY, TEXT = TASKS["qa"], TASKS["summarization"], TASKS["text-to-text"]
SCRIPTS = {
    "ar": "ARABIC",
    "ur": "ARABIC",
    "zh": "CJK",
    "hi": "DEVANAGARI",
    "bn": "BENGALI",
    "th": "THAI",
    "ru": "CYRILLIC",
    "el": "GREEK",
    "am": "ETHIOPIC",
}


def question(language: str = "en", context: str = "It is red.", asked: str = "Which?") -> Example:
    fields = {"context": context, "question": asked}
    return Example("q1", "g", language, fields, ("red",))


def article(language: str = "en") -> Example:
    return Example("a1", "g", language, {"article": "It rained."}, ("Rain",))


@pytest.mark.parametrize("language", sorted(QA_PROMPTS))
def test_each_question_prompt_is_short_holds_both_texts_and_ends_on_a_cue(language: str) -> None:
    prompt = render(QA, question(language))
    assert prompt.body == "It is red."
    assert "Which?" in prompt.suffix
    assert prompt.text.endswith((":", "："))
    assert len(prompt.prefix) + len(prompt.suffix) < 130
    assert unicodedata.is_normalized("NFC", prompt.text)


@pytest.mark.parametrize("language", sorted(SUMMARY_PROMPTS))
def test_each_summary_prompt_instructs_then_gives_the_article_then_a_cue(language: str) -> None:
    prompt = render(SUMMARY, article(language))
    assert prompt.body == "It rained."
    assert prompt.prefix.count("\n") == 1
    assert prompt.suffix.startswith("\n")
    assert prompt.suffix.endswith((":", "："))
    assert len(prompt.prefix) + len(prompt.suffix) < 110
    assert unicodedata.is_normalized("NFC", prompt.text)


@pytest.mark.parametrize("prompts", [QA_PROMPTS, SUMMARY_PROMPTS], ids=["qa", "summarization"])
@pytest.mark.parametrize("language", sorted(SCRIPTS))
def test_a_prompt_is_written_in_the_script_of_its_language(prompts, language: str) -> None:
    text = "".join(prompts[language].split("{")[0].split())
    names = [unicodedata.name(letter) for letter in text if letter.isalpha()]
    assert names
    assert all(name.startswith(SCRIPTS[language]) for name in names)


def test_the_languages_asked_for_have_prompts_and_no_two_share_one() -> None:
    wanted = "en ar zh sw am ha so yo hi bn ur th tr ru es fr de vi id".split()
    assert set(wanted) <= set(SUMMARY_PROMPTS)
    assert {"en", "es", "de", "fr", "ar", "zh", "hi", "vi", "tr", "th", "ru", "sw"} <= set(
        QA_PROMPTS
    )
    for prompts in (QA_PROMPTS, SUMMARY_PROMPTS):
        assert len(set(prompts.values())) == len(prompts)


def test_a_language_without_prompt_takes_english_and_says_so() -> None:
    template, notice = template_for(QA, "fi")
    assert template == QA_PROMPTS["en"]
    assert notice is not None
    assert "'fi'" in notice
    assert "data.*.prompt" in notice
    assert "--prompt" in notice
    assert template_for(QA, "es")[1] is None
    assert render(QA, question("fi")) == render(QA, question("en"))


@pytest.mark.parametrize("code", ["pt-BR", "pt_PT", "PT"])
def test_a_region_takes_the_prompt_of_its_language_before_english(code: str) -> None:
    assert template_for(SUMMARY, code) == (SUMMARY_PROMPTS["pt"], None)


def test_written_out_prompts_are_the_same_in_every_language_without_notice() -> None:
    assert template_for(TEXT, "fi") == ("{prompt}", None)
    row = Example("t", "g", "fi", {"prompt": "2 + {x} =", "extra": "no"}, ("4",))
    prompt = render(TEXT, row)
    assert (prompt.prefix, prompt.body, prompt.suffix) == ("2 + {x} =", "", ""), "it may not be cut"


def test_of_several_columns_the_longest_may_be_shortened() -> None:
    row = Example("t", "g", "en", {"instruction": "Translate.", "input": "a long text"}, ("b",))
    prompt = render(TEXT, row, "{instruction}\n{input}\nAnswer:")
    assert (prompt.prefix, prompt.body, prompt.suffix) == (
        "Translate.\n",
        "a long text",
        "\nAnswer:",
    )


def test_a_free_template_names_its_columns_and_the_longest_is_the_body() -> None:
    template = 'Note {source} as {"tone": "{tone}"} {} {0}\n=>'
    assert template_fields(TEXT, template) == ("source", "tone")
    row = Example("t", "g", "en", {"source": "a {tone}", "tone": "{source}"}, ("b",))
    prompt = render(TEXT, row, template)
    assert prompt.body == "a {tone}"
    assert prompt.text == 'Note a {tone} as {"tone": "{source}"} {} {0}\n=>'
    for faulty in ("nothing", "{}", "{a} and {a}"):
        with pytest.raises(ValueError, match="names no column|exactly once"):
            check_template(TEXT, faulty)


# The two prompts of Alpaca's train.py.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def test_without_an_input_alpacas_prompt_is_its_prompt_for_rows_without_one() -> None:
    for end in ("", "\n"):
        template = ALPACA_WITH_INPUT + end
        row = Example("t", "g", "en", {"instruction": "Count.", "input": ""}, ("1",))
        expected = (ALPACA_WITHOUT_INPUT + end).replace("{instruction}", "Count.")
        prompt = render(TEXT, row, template)
        assert prompt.text == expected
        assert prompt.body == "Count."
        filled = {"instruction": "Count.", "input": "from 2"}
        whole = render(TEXT, Example("t", "g", "en", filled, ("2",)), template)
        assert whole.text == template.format(**filled)


@pytest.mark.parametrize(
    ("template", "name", "expected"),
    [
        ("{a}\n{b}", "b", "{a}"),
        ("{a}\n{b}", "a", "{b}"),
        ("{a}\n\n{b}\n", "b", "{a}\n"),
        ("{a}\n\n{b}\n\nAnswer:", "a", "{b}\n\nAnswer:"),
        ("{a}\n\n{b}\nAnswer:", "b", "{a}\n\nAnswer:"),
        ("Do as told.\nText: {a}\nTask: {b}\nAnswer:", "a", "Do as told.\nTask: {b}\nAnswer:"),
        ("Text: {a}\nTask: {b}\nAnswer:", "b", "Text: {a}\nAnswer:"),
        ("Be brief.\n{a}\nText:\n{b}\n=>", "b", "Be brief.\n{a}\n=>"),
        ("文章：\n{a}\n问题：\n{b}\n答案：", "a", "问题：\n{b}\n答案："),
        ("## Text\n\n{a}\n\n## Task\n\n{b}\n\n## Answer\n", "a", "## Task\n\n{b}\n\n## Answer\n"),
        ("Translate:\n\n{a}\n\n{b}\n\nNow:", "a", "Translate:\n\n{b}\n\nNow:"),
        ("{a}:\n{b}\n=>", "b", "{a}:\n=>"),
    ],
)
def test_a_field_is_left_out_with_its_label_and_one_gap_stays(
    template: str, name: str, expected: str
) -> None:
    assert name in optional_fields(TEXT, template)
    assert without_fields(template, [name]) == expected
    row = Example("t", "g", "en", {"a": "A", "b": "B", name: ""}, ("z",))
    assert render(TEXT, row, template).text == expected.replace("{a}", "A").replace("{b}", "B")


@pytest.mark.parametrize(
    ("template", "optional"),
    [
        ("{a}", ()),
        ("{a} {b}\n{c}", ("c",)),
        ("{a}\n{b} Answer:", ("a",)),
        ("{a}\nText: {b}\n", ("a", "b")),
        ("{a} and {b}", ()),
    ],
)
def test_only_fields_on_lines_of_their_own_can_be_left_out(
    template: str, optional: tuple[str, ...]
) -> None:
    assert optional_fields(TEXT, template) == optional


def test_the_fields_of_a_task_are_never_left_out() -> None:
    assert optional_fields(QA, QA_PROMPTS["en"]) == ()
    assert "\nText: \nQuestion: Which?" in render(QA, question(context="")).text


def test_of_fields_that_are_all_empty_none_is_left_out() -> None:
    row = Example("t", "g", "en", {"a": "", "b": ""}, ("z",))
    assert render(TEXT, row, "{a}\n{b}\n=>").text == "\n\n=>"


def test_placeholders_and_braces_in_the_texts_stay_as_they_are() -> None:
    row = question(context="a {question} {x}", asked="what is {context}?")
    prompt = render(QA, row, 'T: {context} {"a": {b}} Q: {question} A:')
    assert prompt.text == 'T: a {question} {x} {"a": {b}} Q: what is {context}? A:'
    three = Example("t", "g", "en", {"a": "1", "b": "{c}", "c": "{b}"}, ("z",))
    assert render(TEXT, three, "{a} {b} {c}").text == "1 {c} {b}"


def test_the_question_may_come_before_the_context() -> None:
    prompt = render(QA, question(), "{question}|{context}|")
    assert (prompt.prefix, prompt.body, prompt.suffix) == ("Which?|", "It is red.", "|")


@pytest.mark.parametrize("template", ["{context}", "{question}", "{context}{context}{question}"])
def test_a_template_without_each_placeholder_once_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=r"\{context\} and \{question\} exactly once each"):
        render(QA, question(), template)
    with pytest.raises(ValueError, match=r"holds \{article\} 0 times.*\{article\} exactly once$"):
        check_template(SUMMARY, template)


def test_a_row_without_a_field_of_the_template_is_named() -> None:
    with pytest.raises(ValueError, match="row 'a1' has no 'tone'.*it has article"):
        render(TEXT, article(), "{article} {tone}")


@pytest.mark.parametrize("template", ["no field " * 99, "{source}{source}" + "x" * 875])
def test_a_long_template_is_cut_in_messages(template: str) -> None:
    with pytest.raises(ValueError, match=r"got '.{61}… \(891 characters\); write"):
        check_template(TEXT, template)
