import json
from pathlib import Path

import pytest

from grasp_lora.tasks.qa import load_examples, read_examples

ROW = {"id": "1", "context": "It is red.", "question": "Which colour?", "answers": ["red"]}
DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the published question files are not beside the repository"
)


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), "utf-8")
    return path


def squad(*questions: dict) -> dict:
    return {"version": "1.1", "data": [{"paragraphs": [{"context": "It is red.", "qas": [
        *questions
    ]}]}]}  # fmt: skip


def test_jsonl_rows_are_read_as_examples(tmp_path: Path) -> None:
    second = {**ROW, "id": 2, "answers": ["red", "is red", "red"]}
    one, two = read_examples(write(tmp_path / "a.jsonl", ROW, second), "en")
    assert (one.id, one.language, one.references) == ("1", "en", ("red",))
    assert dict(one.fields) == {"context": "It is red.", "question": "Which colour?"}
    assert (two.id, two.references) == ("2", ("red", "is red"))
    assert one.group == two.group


@pytest.mark.parametrize("indent", [None, 2])
def test_squad_json_gives_the_same_rows_as_jsonl(tmp_path: Path, indent: int | None) -> None:
    answers = [{"text": "red", "answer_start": 6}]
    document = squad({"id": "1", "question": "Which colour?", "answers": answers})
    path = tmp_path / "a.txt"
    path.write_text(json.dumps(document, indent=indent), "utf-8")
    examples, report = load_examples(path, "en")
    assert examples == read_examples(write(tmp_path / "b", ROW), "en")
    assert (report.form, report.rows, report.contexts, report.answers_outside) == ("squad", 1, 1, 0)


def test_byte_order_mark_blank_lines_and_line_separators_do_no_harm(tmp_path: Path) -> None:
    row = {**ROW, "context": "It is\u2028red."}
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n\n")
    assert read_examples(path, "en")[0].fields["context"] == "It is\u2028red."


def test_decomposed_text_is_composed_so_that_answers_are_found(tmp_path: Path) -> None:
    row = {**ROW, "context": "Un cafe\u0301.", "answers": ["caf\u00e9"]}
    examples, report = load_examples(write(tmp_path / "a.jsonl", row), "fr")
    assert examples[0].fields["context"] == "Un caf\u00e9."
    assert report.answers_outside == 0


def test_answers_outside_the_context_are_kept_and_counted(tmp_path: Path) -> None:
    rows = [{**ROW, "id": "a", "answers": ["blue"]}, {**ROW, "id": "b"}]
    examples, report = load_examples(write(tmp_path / "a.jsonl", *rows), "en")
    assert len(examples) == 2
    assert report.answers_outside == 1


def test_contexts_alike_but_for_white_space_and_width_are_one_group(tmp_path: Path) -> None:
    rows = [ROW, {**ROW, "id": "2", "context": " It\u00a0is  red."}, {**ROW, "id": "3",
            "context": "It is blue red."}]  # fmt: skip
    one, two, three = read_examples(write(tmp_path / "a.jsonl", *rows), "en")
    assert one.group == two.group != three.group


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl.*give the path"):
        read_examples(tmp_path / "gone.jsonl", "en")


@pytest.mark.parametrize("text", ["", " \n", "\ufeff"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match="empty"):
        read_examples(path, "en")


def test_a_line_that_is_not_json_is_named_by_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROW)
    path.write_text(path.read_text("utf-8") + "\n\n{broken", "utf-8")
    with pytest.raises(ValueError, match=r"a\.jsonl:3: not JSON"):
        read_examples(path, "en")


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "caf\xe9"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_examples(tmp_path / "a.jsonl", "fr")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, "question must be a text"),
        ({"question": None}, "question must be a text"),
        ({"context": "  "}, "context must be a text"),
        ({"answers": []}, "answers is empty"),
        ({"answers": "red"}, "answers must be a list"),
        ({"answers": {"text": ["red"]}}, "answers must be a list"),
        ({"answers": ["red", ""]}, "answer must be a text"),
        ({"id": None}, "id must be"),
        ({"id": True}, "id must be"),
    ],
)
def test_a_faulty_row_is_refused_with_its_place(tmp_path: Path, change: dict, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {**ROW, "id": "0"}, {**ROW, **change})
    with pytest.raises(ValueError, match=rf"a\.jsonl:2: {message}"):
        read_examples(path, "en")


def test_missing_keys_are_all_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"id": "1", "question": "x"})
    with pytest.raises(ValueError, match="missing context, answers"):
        read_examples(path, "en")


def test_a_repeated_id_is_refused_even_across_number_and_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROW, {**ROW, "id": 1})
    with pytest.raises(ValueError, match=r"a\.jsonl:2: the id '1' is used twice"):
        read_examples(path, "en")


def test_a_row_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.jsonl:1: a JSON object is needed, got list"):
        read_examples(write(tmp_path / "a.jsonl", [1]), "en")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"data": 3}, "'data' must be a list"),
        ({"data": [{"x": 1}]}, r"data\[0\]: 'paragraphs'"),
        ({"data": [{"paragraphs": [{"context": "c"}]}]}, r"data\[0\].paragraphs\[0\]: 'qas'"),
        (squad({"id": "1", "answers": [{"text": "red"}]}), r"qas\[0\]: missing question"),
        (squad({"id": "1", "question": "q", "answers": [{}]}), r"qas\[0\]: answer must be"),
        (squad("x"), r"qas\[0\]: a JSON object"),  # type: ignore[arg-type]
        ({"data": []}, "holds no question"),
    ],
)
def test_faulty_squad_json_is_refused_with_its_place(
    tmp_path: Path, document: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_examples(write(tmp_path / "a.json", document), "en")


@needs_data
@pytest.mark.parametrize("language", ["ar", "de", "en", "es", "hi", "ru", "th", "tr", "vi", "zh"])
def test_published_parallel_files_are_read_whole(language: str) -> None:
    _, report = load_examples(DATA / "qa" / f"{language}.jsonl", language)
    assert (report.rows, report.contexts, report.answers_outside) == (826, 160, 0)


@needs_data
def test_published_squad_files_are_read_and_their_stray_answers_counted() -> None:
    _, report = load_examples(DATA / "raw" / "arcd-train.json", "ar")
    assert (report.form, report.rows) == ("squad", 693)
    # Three questions have no accepted answer in their passage.
    assert report.answers_outside == 3
    assert load_examples(DATA / "raw" / "xquad.zh.json", "zh")[1].answers_outside == 0


@needs_data
def test_a_published_file_with_an_empty_question_is_refused_at_its_place() -> None:
    with pytest.raises(ValueError, match=r"paragraphs\[\d+\]\.qas\[\d+\]: question must be a text"):
        load_examples(DATA / "raw" / "cmrc2018_trial.json", "zh")
