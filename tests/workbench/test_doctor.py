"""What the machine has is told from the package's own metadata, and what to install from that."""

import socket
from importlib import metadata

import pytest
from typer.testing import CliRunner

from grasp_lora.cli import app
from grasp_lora.data import fetch
from grasp_lora.workbench import doctor
from grasp_lora.workbench.doctor import Need, advice, needs
from hub_server import serve


def test_needs_are_those_of_the_installed_package():
    found = {one.name: one for one in needs() if not one.extra}
    assert found["torch"].met
    assert found["torch"].installed == metadata.version("torch")
    extras = {one.extra for one in needs()}
    assert {"demo", "metrics", "quantization"} < extras
    assert "dev" not in extras


@pytest.mark.parametrize(
    ("installed", "met"), [("2.6", True), ("2.13.0+cpu", True), ("2.5.9", False), (None, False)]
)
def test_a_version_that_is_too_old_is_as_good_as_none(installed, met):
    assert Need("torch", ">=2.6", installed, "").met == met


def test_what_to_install_is_one_command_a_purpose():
    found = [
        Need("torch", ">=2.6", "2.5", ""),
        Need("rich", ">=13", None, ""),
        Need("jieba", ">=0.42", None, "metrics"),
        Need("gguf", ">=0.17", "1.0", "demo"),
    ]
    assert advice(found) == [
        "needed: pip install 'torch>=2.6' 'rich>=13' (now missing: torch>=2.6, rich>=13)",
        "optional, for metrics: pip install 'grasp-lora[metrics]' (now missing: jieba>=0.42)",
    ]


def test_the_hub_is_asked_once_and_its_silence_is_told(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_secret")
    with serve(tmp_path) as url:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        said = fetch.hub_access(5.0)
        assert said.startswith(f"{url} answers (")
        assert said.endswith("; a token is set")
        assert "hf_secret" not in said
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        assert "does not answer (" in fetch.hub_access(1.0)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "is not asked: HF_HUB_OFFLINE is set" in fetch.hub_access(5.0)


def test_the_command_shows_all_and_fails_where_something_needed_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "hub_access", lambda _timeout: "the hub's answer")
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    for text in ("everything needed is installed", "torch", "memory", "the hub's answer"):
        assert text in done.output
    monkeypatch.setattr(doctor, "needs", lambda: [Need("torch", ">=99", "2.6", "")])
    lost = CliRunner().invoke(app, ["doctor"])
    assert lost.exit_code == 1
    assert "needed: pip install 'torch>=99'" in lost.output
