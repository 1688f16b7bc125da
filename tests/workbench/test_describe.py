"""What `data describe` shows of a configuration."""

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from grasp_lora.cli import app
from grasp_lora.config.run_config import make_config
from grasp_lora.workbench.context import encode_part
from grasp_lora.workbench.describe import describe_data
from grasp_lora.workbench.rows import load_run_data
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_job, write_rows


@pytest.fixture
def place(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    return tmp_path


def cells(text: str, where: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {where} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_split_has_its_rows_lengths_and_tokens(place):
    text = describe_data(make_config(job(place)), quiet=True)
    assert "Leakage: none found" in text
    train = cells(text, "target/train")
    assert train[1:4] == ["es", "8", train[3]]
    assert train[-1].endswith("a word")
    assert {cells(text, f"source/{part}")[2] for part in ("train", "dev")} == {"8", "4"}


def test_fertility_says_of_how_many_texts_it_is_where_not_of_all(place, monkeypatch):
    whole = describe_data(make_config(job(place)), quiet=True)
    assert "of more than 10,000 texts it is counted on that many" in whole
    contexts = int(cells(whole, "target/train")[3])
    assert cells(whole, "target/train")[-1].endswith(" a word")
    monkeypatch.setattr("grasp_lora.tasks.encoding.COUNTED", contexts - 1)
    text = describe_data(make_config(job(place)), quiet=True)
    assert cells(text, "target/train")[-1].endswith(f" a word ({contexts - 1} texts)")


def test_examples_are_shown_as_the_model_sees_them_in_each_language(place):
    text = describe_data(make_config(job(place)), quiet=True)
    assert text.count("[PROMPT>") == text.count("[ANSWER>") == 6
    assert "## es, as the model sees it" in text
    assert "Responde con palabras del texto." in text


def test_cut_rows_are_counted(place):
    config = make_config(job(place))
    data = load_run_data(config, lambda _line: None)
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    whole, _ = encode_part(config, data, tokenizer, "target", "train")
    longer = [len(row.input_ids) - 270 for row in whole if len(row.input_ids) > 270]
    assert 0 < len(longer) < len(whole)
    values = job(place)
    values["data"]["max_length"] = 270
    row = cells(describe_data(make_config(values), quiet=True), "target/train")
    assert row[6].split()[0] == str(len(longer))
    assert int(row[7]) >= sum(longer)
    uncut = cells(describe_data(config, quiet=True), "target/train")
    assert uncut[6:9] == ["0 (0%)", "0", "0"]


def test_rows_that_cannot_fit_are_left_out_and_told(place):
    values = job(place)
    config = make_config(values)
    rows = load_run_data(config, lambda _line: None).parts["target"]["train"]
    long = {"id": "far", "context": "It is red.", "question": "y" * 900, "answers": ["red"]}
    given = [{"id": e.id, **e.fields, "answers": list(e.references)} for e in rows] + [long]
    path = place / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in given), "utf-8")
    names = {"dev": range(100, 104), "micro_dev": range(110, 114)}
    files = {part: str(write_rows(place / f"{part}.jsonl", n)) for part, n in names.items()}
    values["data"]["target"] = {"language": "es", "files": {"train": str(path), **files}}
    with pytest.raises(ValueError, match="target train: 1 of 9 rows left out, such as 'far'.* 10%"):
        describe_data(make_config(values), quiet=True)
    values["data"]["max_faulty"] = 0.2
    text = describe_data(make_config(values), quiet=True)
    assert cells(text, "target/train")[2] == "8"
    assert "- target train: 1 of 9 rows left out, such as 'far': they do not fit" in text


def test_leaks_are_a_verdict_not_an_end(place):
    values = job(place)
    paths = {
        part: str(write_rows(place / f"{part}.jsonl", numbers))
        for part, numbers in {"train": [1, 2], "micro_dev": [3], "dev": [4], "test": [2]}.items()
    }
    values["data"]["target"] = {"language": "es", "files": paths}
    text = describe_data(make_config(values), quiet=True)
    assert "**Leakage: 1 pairs of examples" in text
    assert "id: target/train q2 and target/test q2" in text


def test_a_language_without_a_prompt_is_told(place):
    values = job(place)
    path = write_rows(place / "all.jsonl", range(30))
    rows = {"train": 8, "dev": 4, "micro_dev": 4}
    values["data"]["target"] = {"language": "xx", "files": str(path), "rows": rows}
    text = describe_data(make_config(values), quiet=True)
    assert "no built-in prompt for language 'xx'" in text


def test_a_chat_template_of_a_given_adapter_is_shown_and_told(place):
    adapter = tiny_adapter_folder(place / "lora", tiny_model())
    (adapter / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    )
    values = job(place, adapters={"source": str(adapter)})
    config = make_config(values | {"data": values["data"] | {"chat": True}})
    text = describe_data(config, quiet=True)
    assert f"- the chat template is the one saved in {adapter}; the base model has none" in text
    assert "[PROMPT>[user]" in text


def test_the_command_prints_it_and_writes_the_file(place):
    config = write_job(place / "run.yaml", job(place))
    out = place / "rows.md"
    done = CliRunner().invoke(app, ["data", "describe", str(config), "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert out.read_text(encoding="utf-8").strip() in done.output
    assert not (place / "run").exists()


def test_a_file_that_is_there_is_not_replaced_unasked(place):
    out = place / "rows.md"
    out.write_text("precious")
    config = make_config(job(place))
    with pytest.raises(
        ValueError, match=r"rows\.md' exists; name another file, or pass --overwrite"
    ):
        describe_data(config, out, quiet=True)
    assert out.read_text() == "precious"
    assert describe_data(config, out, quiet=True, overwrite=True) in out.read_text()


def test_extra_rows_are_described_beside_the_others(place):
    values = job(place)
    path = write_rows(place / "extra.jsonl", range(5), prefix="x")
    values["data"]["extra"] = {"files": str(path)}
    text = describe_data(make_config(values), quiet=True)
    assert cells(text, "extra/train")[1:4] == ["es", "5", "5"]
    assert "- extra rows, which are no labels: 5" in text
    test = load_run_data(make_config(job(place)), lambda _line: None).parts["target"]["test"][0]
    leaking = dict(test.fields) | {"id": "new", "answers": list(test.references)}
    path.write_text(json.dumps(leaking) + "\n")
    text = describe_data(make_config(values), quiet=True)
    assert f"target/test {test.id} and extra/train new" in text


def test_rows_are_read_before_torch_is_loaded():
    line = "import grasp_lora.workbench.describe, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
