"""The chat template that an adapter was trained with, where its folder holds one.

Trainers save the tokenizer with the adapter, and the model that serves it reads the template there.
A base model that was not trained on conversations has no template of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_lora.adapters.folder import adapter_in, read_json_file
from grasp_lora.base.words import shown

TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_FILE = "tokenizer_config.json"


@dataclass(frozen=True)
class GivenTemplate:
    """A chat template from an adapter folder.

    Attributes:
        text: the template.
        folder: the adapter folder it comes from.
        others: given adapter folders with another template.
    """

    text: str
    folder: Path
    others: tuple[Path, ...] = ()


def saved_template(folder: str | Path) -> str | None:
    """Return the chat template in an adapter folder, None if there is none.

    Raises:
        ValueError: the tokenizer's file is damaged, or several subfolders hold an adapter.
    """
    place = adapter_in(folder)
    if (place / TEMPLATE_FILE).is_file():
        try:
            return (place / TEMPLATE_FILE).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{place / TEMPLATE_FILE} is not UTF-8 ({error}); restore the file"
            ) from None
    if not (place / _TOKENIZER_FILE).is_file():
        return None
    found = read_json_file(place / _TOKENIZER_FILE).get("chat_template")
    if isinstance(found, list):
        found = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
    chosen = _default(found)
    if not isinstance(chosen, str | None):
        raise ValueError(
            f"{place / _TOKENIZER_FILE}: chat_template is {shown(chosen)}, which is no text; "
            "restore the file"
        )
    return chosen


def given_template(folders: Sequence[Path]) -> GivenTemplate | None:
    """Return the chat template of the last adapter that has one, which is the target's in a run.

    Raises:
        ValueError: see `saved_template`.
    """
    saved = {folder: text for folder in folders if (text := saved_template(folder))}
    if not saved:
        return None
    last, text = list(saved.items())[-1]
    return GivenTemplate(text, last, tuple(one for one, other in saved.items() if other != text))


def put_template(tokenizer: Any, given: GivenTemplate | None) -> list[str]:
    """Make a tokenizer use a given chat template; return a line if there are others, else none."""
    if given is None:
        return []
    own, tokenizer.chat_template = own_template(tokenizer), given.text
    without = [f"{folder} has another" for folder in given.others]
    if own != given.text:
        without.append("the base model has none" if own is None else "the base model has another")
    used = f"the chat template is the one saved in {given.folder}"
    return [f"{used}; {', '.join(without)}"] if without else []


def own_template(tokenizer: Any) -> str | None:
    """Return the chat template of a tokenizer; None if it has none."""
    return _default(tokenizer.chat_template)


def _default(template: Any) -> str | None:
    """Return the default one where a tokenizer has several templates, each with a name."""
    return template.get("default") if isinstance(template, dict) else template or None
