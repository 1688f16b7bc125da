"""What a run says of given adapters: their rows, what they seem to know, the prompt in force."""

import json
from pathlib import Path

import pytest

from grasp_lora.base.files import read_json
from grasp_lora.config.run_config import RunConfig
from grasp_lora.core.evidence.known import KnownRows
from grasp_lora.plans.run import run
from grasp_lora.report.card import facts_of_run
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_rows

PROMPT = 'Say it.\nText: {context}\n"Question": {question}'


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished choice between two given adapters; the target's seems to know two held rows."""
    folder = tmp_path_factory.mktemp("given-rows")
    tiny_backbone_folder(folder / "base")
    for seed, role in enumerate(("source", "target")):
        tiny_adapter_folder(folder / role, tiny_model(), r=4, seed=seed)
    rows = write_rows(folder / "rows.jsonl", range(24))
    seen = write_rows(folder / "seen.jsonl", range(0, 24, 4))
    given = {role: str(folder / role) for role in ("source", "target")}
    sizes = {"train": 8, "dev": 4, "micro_dev": 4, "test": 4}
    target = {"language": "es", "files": str(rows), "rows": sizes, "prompt": PROMPT}
    values = job(
        folder,
        recipe="auto",
        output=str(folder / "run"),
        adapters=given | {"trained_on": {"target": str(seen)}},
        data={"max_length": 640, "target": target},
        budget=5,
    )
    found = KnownRows((0, 1), 2, 8, 0.01, 2.5, 0.95, 0.9)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("grasp_lora.plans.auto_record.known_rows", lambda *_: found)
        return run(RunConfig.model_validate(values), quiet=True)


def test_the_rows_that_it_was_trained_on_are_in_train_and_told(finished):
    data = read_json(finished / "data.json")
    assert {f"q{n}" for n in range(0, 24, 4)} <= set(data["target"]["splits"]["train"])
    assert data["trained_on"] == {"target": {"from": "seen.jsonl", "rows": 6, "in_train": 6}}
    line = "adapters.target was trained on the 6 rows of seen.jsonl: 6 of the target train rows are"
    for name in ("report.md", "report.html"):
        text = (finished / name).read_text(encoding="utf-8").replace("\\", "")
        assert line in text, name


def test_rows_that_it_seems_to_know_are_told(finished):
    (note,) = [one for one in read_json(finished / "recipe.json")["notes"] if "knows" in one]
    assert note.startswith("adapters.target knows 2 of 8 dev and micro-dev rows suspiciously well")
    assert "adapters.target knows 2 of 8" in (finished / "report.md").read_text(encoding="utf-8")


def test_the_prompt_in_force_is_in_the_run_folder_the_report_and_the_card(finished):
    assert read_json(finished / "data.json")["prompts"]["target"] == {"template": PROMPT}
    report = (finished / "report.md").read_text(encoding="utf-8")
    (line,) = [one for one in report.splitlines() if "prompt of the target examples:" in one]
    quoted = line.partition("examples: ")[2].replace("\\\\", "\0").replace("\\", "")
    assert json.loads(quoted.replace("\0", "\\")) == PROMPT
    assert "prompt of the target examples:" in (finished / "report.html").read_text("utf-8")
    facts = facts_of_run(finished)
    assert facts is not None
    assert facts.prompt == PROMPT
