"""An upload to a hub: what goes out, what stays, and what is asked and refused before."""

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard, constants
from typer.testing import CliRunner

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.files import finish_run, write_json, write_text
from grasp_lora.cli import app
from grasp_lora.sharing.export import Request, write_export
from helpers import tiny_adapter_folder, tiny_model
from hub_uploads import Repository, serve_uploads

# The hub's client hands a file to its HTTP client in a way that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")

OF_ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "grasp_lora.json"}
PATH = "/home/ana/rows.jsonl"


@pytest.fixture
def hub(monkeypatch):
    with serve_uploads() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", found.token)
        yield found


@pytest.fixture
def adapter(tmp_path):
    """Return an adapter folder with a card, and beside it what must stay."""
    plain = tiny_adapter_folder(tmp_path / "plain", tiny_model())
    out = write_export(Request(plain, "peft", tmp_path / "adapter"), lambda _line: None)
    write_text(out / "training_args.bin", "x")
    return out


@pytest.fixture
def run_folder(tmp_path, adapter):
    """Return the folder of a finished run with that adapter as its result."""
    run = tmp_path / "run"
    run.mkdir()
    adapter.rename(run / "final")
    write_json(run / "final" / "merge.json", {"from": PATH})
    write_text(run / "final" / "parts.safetensors", "x")
    write_json(run / "config.json", {"format": "grasp-lora run", "version": 1, "config": {}})
    write_text(run / "report.md", f"rows from {PATH}\n")
    write_text(run / "report.html", f"<td>{PATH}</td>")
    finish_run(run)
    return run


def push(*arguments):
    return CliRunner().invoke(app, ["push", *map(str, arguments)])


def test_an_adapter_goes_out_privately_with_its_card_and_nothing_else(hub, adapter):
    done = push("owner/name", adapter, "--yes")
    assert done.exit_code == 0, done.output
    found = hub.repositories["owner/name"]
    assert found.private
    assert found.files.keys() == OF_ADAPTER
    assert all(found.files[name] == (adapter / name).read_bytes() for name in OF_ADAPTER)
    lines = done.stdout.splitlines()
    assert lines[0] == "to owner/name (private; new), as owner:"
    assert "looked through 4 files: no absolute path and no token" in lines
    assert "not uploaded: serve.txt, training_args.bin" in lines
    assert lines[-1] == f"uploaded: {hub.url}/owner/name"
    assert all(any(line.startswith(f"  {name}  ") for line in lines) for name in OF_ADAPTER)


def test_what_was_uploaded_is_an_adapter(hub, adapter, tmp_path):
    push("owner/name", adapter, "--yes", "--public")
    found = hub.repositories["owner/name"]
    assert not found.private
    there = tmp_path / "there"
    there.mkdir()
    for name, content in found.files.items():
        (there / name).write_bytes(content)
    assert read_adapter(there).adapter.keys() == read_adapter(adapter).adapter.keys()
    assert ModelCard.load(there / "README.md").data.get("library_name") == "peft"


def test_a_run_brings_its_reports_without_paths(hub, run_folder):
    done = push("owner/name", run_folder, "--yes")
    assert done.exit_code == 0, done.output
    files = hub.repositories["owner/name"].files
    assert files.keys() == OF_ADAPTER | {"report.html", "report.md"}
    assert files["report.md"] == "rows from …/rows.jsonl\n".encode()
    assert files["report.html"] == "<td>…/rows.jsonl</td>".encode()
    assert "merge.json, parts.safetensors" in done.output
    assert "the reports show questions, texts and answers of test rows" in done.output


def test_other_files_of_the_repository_stay(hub, adapter):
    hub.repositories["owner/name"] = Repository(True, {"mine.txt": b"mine", "README.md": b"old"})
    done = push("owner/name", adapter, "--yes")
    assert "to owner/name (private; there already)" in done.output
    assert "other files in owner/name stay: mine.txt" in done.output
    files = hub.repositories["owner/name"].files
    assert files["mine.txt"] == b"mine"
    assert files["README.md"] == (adapter / "README.md").read_bytes()


@pytest.mark.parametrize("where", ["large", "commit"])
def test_an_interrupted_upload_leaves_nothing_and_can_be_done_again(hub, adapter, where):
    hub.refused = where
    done = push("owner/name", adapter, "--yes")
    assert done.exit_code == 2
    assert "error: the hub does not let you write there" in done.output
    assert hub.repositories["owner/name"].files == {}
    hub.refused = ""
    assert push("owner/name", adapter, "--yes").exit_code == 0
    assert hub.repositories["owner/name"].files.keys() == OF_ADAPTER
    assert hub.sent == 1


def test_without_a_yes_nothing_goes_out(hub, adapter):
    done = push("owner/name", adapter)
    assert done.exit_code == 2
    assert "to owner/name (private; new), as owner:" in done.output
    assert "no terminal is there to ask; pass --yes" in done.output
    assert hub.repositories == {}


@pytest.mark.parametrize(("answer", "code"), [("y\n", 0), ("n\n", 1)])
def test_a_terminal_is_asked(hub, adapter, monkeypatch, answer, code):
    runner = CliRunner()
    monkeypatch.setattr("grasp_lora.cli.exports.asked_at_a_terminal", lambda: True)
    done = runner.invoke(app, ["push", "owner/name", str(adapter)], input=answer)
    assert done.exit_code == code
    assert ("owner/name" in hub.repositories) == (code == 0)


def test_without_a_login_it_is_one_line(hub, adapter, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    done = push("owner/name", adapter, "--yes")
    assert done.output == (
        "error: there is no login for the hub: run hf auth login, or set HF_TOKEN\n"
    )
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    done = push("owner/name", adapter, "--yes")
    assert done.output == "error: the hub does not take your token: run hf auth login again\n"
    assert hub.repositories == {}


def edited(adapter, name, text):
    write_text(adapter / name, (adapter / name).read_text(encoding="utf-8") + text)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("README.md", f"\nfrom {PATH}\n", f"README.md has the path {PATH}"),
        ("README.md", "\nhf_" + "b2" * 17, "README.md has a token or key"),
        ("grasp_lora.json", f'"{PATH}"', f"grasp_lora.json has the path {PATH}"),
    ],
)
def test_what_must_not_go_out_is_named_and_stops_it(hub, adapter, name, text, message):
    edited(adapter, name, text)
    done = push("owner/name", adapter, "--yes")
    assert done.exit_code == 2
    assert message in done.output
    assert "b2b2" not in done.output
    assert hub.repositories == {}


def test_a_vocabulary_may_have_tokens_like_paths(hub, adapter):
    write_text(adapter / "tokenizer.json", json.dumps({"vocab": {"/usr/local/": 3}}))
    assert push("owner/name", adapter, "--yes").exit_code == 0
    assert "tokenizer.json" in hub.repositories["owner/name"].files


def test_what_cannot_be_pushed_is_one_error(hub, adapter, run_folder, tmp_path):
    plain = tmp_path / "plain"
    (plain / "README.md").unlink()
    for arguments, message in (
        (("name", run_folder), "'name' names no owner; write owner/name"),
        (("a/b/c", run_folder), "'a/b/c' is no hub id"),
        (("owner/name", tmp_path / "nothing"), "is not a folder"),
        (("owner/name", plain), "has no card (README.md); grasp-lora export --to peft writes"),
    ):
        done = push(*arguments, "--yes")
        assert (done.exit_code, message in done.output) == (2, True), done.output
    hub.repositories["owner/name"] = Repository(True)
    done = push("owner/name", run_folder, "--yes", "--public")
    assert "is there and private; change that in its settings" in done.output
    assert hub.repositories["owner/name"].files == {}


def test_the_command_asks_the_hub_that_the_environment_names(hub, adapter):
    given = {"HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, "-m", "grasp_lora", "push", "owner/name", str(adapter), "--yes"]
    environment = {n: v for n, v in os.environ.items() if n != "HF_HUB_OFFLINE"} | given
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert hub.repositories["owner/name"].files.keys() == OF_ADAPTER


def test_a_hub_that_does_not_answer_is_one_line(hub, adapter, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = push("owner/name", adapter, "--yes")
    assert done.exit_code == 2
    assert done.output.startswith("error: the hub does not answer as it should (")
