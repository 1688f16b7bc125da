import unicodedata

import pytest

from grasp_lora.tasks.base import TASKS, Example, first_line, task_named
from grasp_lora.tasks.prompts import PROMPTS, render_question, template_for


def question(language: str = "en", context: str = "It is red.", asked: str = "Which?") -> Example:
    fields = {"context": context, "question": asked}
    return Example("q1", "g", language, fields, ("red",))


@pytest.mark.parametrize("language", sorted(PROMPTS))
def test_each_prompt_is_short_holds_both_texts_and_ends_on_a_cue(language: str) -> None:
    prompt = render_question(question(language))
    assert prompt.body == "It is red."
    assert "Which?" in prompt.suffix
    assert prompt.text.endswith((":", "："))
    assert len(prompt.prefix) + len(prompt.suffix) < 130
    assert unicodedata.is_normalized("NFC", prompt.text)


def test_no_two_languages_share_a_prompt() -> None:
    assert len(set(PROMPTS.values())) == len(PROMPTS) == 12


def test_a_language_without_prompt_takes_english_and_says_so() -> None:
    template, notice = template_for("fi")
    assert template == PROMPTS["en"]
    assert notice is not None
    assert "'fi'" in notice
    assert template_for("es")[1] is None
    assert render_question(question("fi")) == render_question(question("en"))


def test_placeholders_and_braces_in_the_texts_stay_as_they_are() -> None:
    row = question(context="a {question} {x}", asked="what is {context}?")
    prompt = render_question(row, "T: {context} Q: {question} A:")
    assert prompt.text == "T: a {question} {x} Q: what is {context}? A:"


def test_the_question_may_come_before_the_context() -> None:
    prompt = render_question(question(), "{question}|{context}|")
    assert (prompt.prefix, prompt.body, prompt.suffix) == ("Which?|", "It is red.", "|")


@pytest.mark.parametrize("template", ["{context}", "{question}", "{context}{context}{question}"])
def test_a_template_without_each_placeholder_once_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match="exactly once"):
        render_question(question(), template)


def test_prediction_is_the_first_line_with_text() -> None:
    assert first_line("\n  red \nQuestion: more") == "red"
    assert first_line(" \n") == ""


def test_task_rows_are_found_by_name_and_unknown_names_refused() -> None:
    assert task_named("qa") is TASKS["qa"]
    assert all(name == task.name for name, task in TASKS.items())
    with pytest.raises(ValueError, match="unknown task 'chess'.*qa"):
        task_named("chess")
