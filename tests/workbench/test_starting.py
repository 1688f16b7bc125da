"""What is found in adapters and in a file, for a first configuration."""

import json
from pathlib import Path

import pytest

from grasp_lora.workbench.starting import model_of, task_of_file


def adapter(folder: Path, base: str | None) -> str:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    return str(folder)


def test_the_backbone_is_the_one_that_the_adapters_name(tmp_path):
    both = [adapter(tmp_path / name, "owner/name") for name in "ab"]
    assert model_of(both) == "owner/name"


def test_adapters_of_two_backbones_are_refused_with_both_names(tmp_path):
    both = [adapter(tmp_path / "a", "owner/one"), adapter(tmp_path / "b", "owner/two")]
    with pytest.raises(ValueError, match="'owner/one', .*b' on 'owner/two'; adapters of one"):
        model_of(both)


def test_without_an_adapter_or_a_named_backbone_the_option_is_asked_for(tmp_path):
    with pytest.raises(ValueError, match="give --model"):
        model_of([])
    with pytest.raises(ValueError, match="--model"):
        model_of([adapter(tmp_path / "a", None)])


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="is no PEFT adapter"):
        model_of([str(tmp_path)])


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"id": "1", "context": "c", "question": "q", "answers": ["a"]}, "qa"),
        ({"text": "t", "summary": "s"}, "summarization"),
        ({"prompt": "i", "output": "o"}, "text-to-text"),
    ],
)
def test_the_task_is_the_one_whose_columns_the_rows_have(tmp_path, row, task):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert task_of_file(file, "ar") == task


def test_a_file_that_fits_no_task_or_has_no_rows_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"foo": 1, "bar": 2}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"columns \['foo', 'bar'\], which fit no task \(qa, "):
        task_of_file(file, "ar")
    empty = tmp_path / "rows.csv"
    empty.write_text("context,question,answers\n", encoding="utf-8")
    with pytest.raises(ValueError, match="no rows"):
        task_of_file(empty, "ar")
