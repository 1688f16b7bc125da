import pytest

from grasp_lora.tasks.base import TASKS, first_line, task_named
from grasp_lora.tasks.prompts import check_template

METRICS = {
    "exact_match",
    "token_f1",
    "bleu",
    "chrf",
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "bertscore_f1",
    "loss",
    "perplexity",
}


def test_prediction_is_the_first_line_with_text() -> None:
    assert first_line("\n  red \nQuestion: more") == "red"
    assert first_line(" \n") == ""


def test_task_rows_are_found_by_name_and_unknown_names_refused() -> None:
    assert list(TASKS) == ["qa", "summarization", "text-to-text"]
    assert task_named("qa") is TASKS["qa"]
    assert all(name == task.name for name, task in TASKS.items())
    with pytest.raises(ValueError, match="unknown task 'chess'.*qa, summarization, text-to-text"):
        task_named("chess")


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_every_row_of_the_table_fits_together(task) -> None:
    for template in task.prompts.values():
        check_template(task, template)
    assert "en" in task.prompts
    assert set(task.metrics) <= METRICS
    assert len(set(task.metrics)) == len(task.metrics)
    assert set(task.aliases) <= {*task.fields, task.answer}
    # A column name may stand for one thing only, or two columns would be read from it.
    names = [name for aliases in task.aliases.values() for name in aliases]
    assert len(set(names)) == len(names)
    assert not set(names) & {*task.fields, task.answer}


def test_arabic_summaries_get_more_tokens_in_every_region() -> None:
    task = TASKS["summarization"]
    limits = [task.new_tokens(code) for code in ("ar", "ar-EG", "arz", "zh", "fi")]
    assert limits == [128, 128, 96, 96, 96]


def test_only_free_text_keeps_its_lines() -> None:
    predictions = {name: task.clean(" one \n two ") for name, task in TASKS.items()}
    assert predictions == {
        "qa": "one",
        "summarization": "one",
        "text-to-text": "one \n two",
    }
    assert [name for name, task in TASKS.items() if not task.one_line] == ["text-to-text"]
