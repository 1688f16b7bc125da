"""A text with a token that the model has no embedding for is refused by every command."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grasp_lora.cli import app
from helpers import BOS_ID, tiny_adapter_folder, tiny_backbone_folder, tiny_model, tiny_tokenizer
from jobs import job, write_job, write_rows

NEW = "<new>"
SIZE = BOS_ID + 1
SPANS = {"train": range(8), "dev": range(8, 12), "micro_dev": range(12, 16), "test": range(16, 20)}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a model, a larger tokenizer, an adapter and rows."""
    folder = tmp_path_factory.mktemp("vocabulary")
    tiny_backbone_folder(folder / "base", vocab=SIZE)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([NEW])
    tokenizer.save_pretrained(folder / "base")
    tiny_adapter_folder(folder / "adapter", tiny_model(vocab=SIZE))
    for part, span in SPANS.items():
        write_rows(folder / f"{part}.jsonl", span)
    return folder


def settings(place: Path, split: str | None = None, **section: Any) -> dict[str, Any]:
    """Return the settings of a run whose first row of `split` has the token in its question."""
    files = {part: place / f"{part}.jsonl" for part in SPANS}
    if split is not None:
        rows = [json.loads(line) for line in files[split].read_text().splitlines()]
        rows[0]["question"] += NEW
        files[split] = place / f"{split}-new.jsonl"
        files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = job(place)
    target = {"language": "es", "files": {part: str(path) for part, path in files.items()}}
    values["data"] = values["data"] | {"target": target | section}
    return values


def refusal(place: Path, values: dict[str, Any], *arguments: str) -> str:
    """Return the error of a command, which must not write anything."""
    config = str(write_job(place / "job.yaml", values))
    before = sorted(place.rglob("*"))
    done = CliRunner().invoke(app, [config if a == "CONFIG" else a for a in arguments])
    assert done.exit_code == 2, done.output
    assert "Traceback" not in done.output
    assert sorted(place.rglob("*")) == before, "a refused command leaves nothing behind"
    return " ".join(done.output.split("error: ")[1].split())


def commands(place: Path) -> dict[str, tuple[tuple[str, ...], str]]:
    """Return name -> (arguments of a command, a split that it reads)."""
    adapter, out = str(place / "adapter"), str(place / "out")
    return {
        "run": (("run", "CONFIG"), "test"),
        "plan": (("plan", "CONFIG"), "micro_dev"),
        "compare": (("compare", "CONFIG", "--out", out), "dev"),
        "ablate": (("ablate", "CONFIG", "--out", out), "train"),
        "describe": (("data", "describe", "CONFIG"), "train"),
        "train": (("train", "CONFIG", "--role", "target", "--out", out), "train"),
        "search": (("search", "CONFIG", "--merged", adapter, "--out", out), "micro_dev"),
        "finetune": (
            ("finetune", "CONFIG", "--start", adapter, "--ratio", "0.4", "--out", out),
            "dev",
        ),
        "evaluate": (("evaluate", adapter, "--config", "CONFIG", "--out", out), "test"),
    }


@pytest.mark.parametrize("name", [*commands(Path())])
def test_every_command_refuses_a_row_with_such_a_token_before_any_work(place, name):
    arguments, split = commands(place)[name]
    said = refusal(place, settings(place, split), *arguments)
    assert f"of target/{split} has the token '{NEW}' with id {SIZE}" in said
    assert f"the model's embedding has {SIZE} rows (ids 0 to {SIZE - 1})" in said
    assert "resize_token_embeddings" in said


@pytest.mark.parametrize("name", ["run", "describe"])
def test_a_prompt_with_such_a_token_is_refused(place, name):
    arguments, _ = commands(place)[name]
    values = settings(place, prompt=f"{NEW} {{context}} {{question}}")
    assert f"of target/train has the token '{NEW}'" in refusal(place, values, *arguments)


def test_a_chat_template_with_such_a_token_is_refused(place, tmp_path):
    tiny_backbone_folder(tmp_path / "base", vocab=SIZE)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    values = settings(place)
    values["model"] |= {"name": str(tmp_path / "base")}
    values["data"] |= {"chat": True}
    for arguments in (("run", "CONFIG"), ("data", "describe", "CONFIG")):
        said = refusal(place, values, *arguments)
        assert f"has the token '<|end|>' with id {SIZE}" in said


def test_rows_without_such_a_token_are_described(place):
    config = str(write_job(place / "job.yaml", settings(place)))
    done = CliRunner().invoke(app, ["data", "describe", config])
    assert done.exit_code == 0, done.output
