"""Chat templates saved with adapters: found as transformers finds them, put on and told."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from grasp_lora.adapters.chat import given_template, put_template, saved_template
from helpers import tiny_tokenizer

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
OTHER = TEMPLATE.replace("[", "<").replace("]", ">")


def adapter(folder: Path, template: str | None = None) -> Path:
    """Write an adapter folder with a tokenizer, as trainers save it."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def test_a_template_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "a", TEMPLATE)
    assert (folder / "chat_template.jinja").is_file()
    assert saved_template(folder) == AutoTokenizer.from_pretrained(folder).chat_template == TEMPLATE
    assert saved_template(adapter(tmp_path / "none")) is None
    assert saved_template(adapter(tmp_path / "outer" / "arabic", OTHER).parent) == OTHER
    assert saved_template(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    "stored",
    [TEMPLATE, [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}]],
)
def test_a_template_in_the_tokenizers_settings_is_read_too(tmp_path: Path, stored: object) -> None:
    folder = adapter(tmp_path / "a")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": stored}))
    own = AutoTokenizer.from_pretrained(folder).get_chat_template()
    assert saved_template(folder) == own == TEMPLATE
    path.write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        saved_template(folder)


def test_the_last_template_is_used_and_others_are_told(tmp_path: Path) -> None:
    source, target = adapter(tmp_path / "s", OTHER), adapter(tmp_path / "t", TEMPLATE)
    bare = adapter(tmp_path / "b")
    tokenizer = tiny_tokenizer()
    assert given_template([bare]) is None
    assert put_template(tokenizer, None) == []
    assert not tokenizer.chat_template
    used = f"the chat template is the one saved in {target}"
    assert put_template(tokenizer, given_template([target, bare])) == [
        f"{used}; the base model has none"
    ]
    assert tokenizer.chat_template == TEMPLATE
    assert put_template(tokenizer, given_template([target])) == []
    assert put_template(tokenizer, given_template([source, target])) == [
        f"{used}; {source} has another"
    ]
    tokenizer.chat_template = {"default": "x", "tools": "y"}
    assert put_template(tokenizer, given_template([source, target])) == [
        f"{used}; {source} has another, the base model has another"
    ]
    assert tokenizer.get_chat_template() == TEMPLATE
