"""The built-in question set: simple facts in short passages in six languages.

A block consists of two entities of one kind. Its passages state all facts about them, each fact
once in the whole set, and there is a question for every sentence. A block belongs to one split as a
whole. So two splits share no fact, not even one that is merely stated next to an answer.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from grasp_lora.tasks.records import Example, text_key

LANGUAGES = ("en", "es", "de", "fr", "ar", "zh")
KINDS = ("country", "element", "animal", "person")
_NO_SPACES = ("zh",)

DEFAULT_SIZES: Mapping[str, Mapping[str, int]] = {
    "source": {"train": 200, "dev": 40},
    "target": {"train": 50, "dev": 50, "micro_dev": 16, "test": 100},
}


@dataclass(frozen=True)
class _Block:
    """Two entities of one kind."""

    kind: str
    entities: tuple[Mapping[str, Any], ...]

    @property
    def questions(self) -> int:
        return len(self.entities) * len(_facts(self.kind)["attributes"])


def builtin_examples(language: str, count: int | None = None, seed: int = 0) -> list[Example]:
    """Return the questions of a language, or `count` of them drawn with `seed`.

    The order is that of the set. An id stands for the same fact in all languages.

    Raises:
        ValueError: the language is not built in, or `count` exceeds the number of questions.
    """
    _check_language(language)
    examples = [e for block in _blocks() for e in _block_examples(block, language)]
    if count is None:
        return examples
    if not 0 <= count <= len(examples):
        raise ValueError(f"count must be in 0..{len(examples)}, got {count}")
    chosen = sorted(random.Random(seed).sample(range(len(examples)), count))
    return [examples[index] for index in chosen]


def fact_split(sizes: Mapping[str, int], seed: int) -> dict[str, tuple[int, ...]]:
    """Return for each split the indices of the blocks with its questions.

    Args:
        sizes: split -> number of questions; splits are filled in this order.
        seed: seed of the random order of the blocks.

    Raises:
        ValueError: a size is negative, or there are too few facts.
    """
    blocks = _blocks()
    waiting = list(range(len(blocks)))
    random.Random(seed).shuffle(waiting)
    block_indices: dict[str, tuple[int, ...]] = {}
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"the size of {name!r} must be 0 or more, got {size}")
        taken: list[int] = []
        while sum(blocks[index].questions for index in taken) < size:
            if not waiting:
                total = sum(block.questions for block in blocks)
                raise ValueError(
                    f"too few embedded questions: {dict(sizes)} need {sum(sizes.values())} of "
                    f"{total}, and no fact may be in two splits; ask for fewer rows or give files"
                )
            taken.append(waiting.pop())
        block_indices[name] = tuple(taken)
    return block_indices


def builtin_splits(
    source_language: str,
    target_language: str,
    sizes: Mapping[str, Mapping[str, int]] | None = None,
    seed: int = 0,
) -> tuple[dict[str, tuple[Example, ...]], dict[str, tuple[Example, ...]]]:
    """Return (splits in the source language, splits in the target language) that share no fact.

    Args:
        source_language: one of `LANGUAGES`.
        target_language: one of `LANGUAGES`.
        sizes: "source" or "target" -> split -> number of examples; either may be missing. None
            means `DEFAULT_SIZES`.
        seed: seed of the assignment of facts to splits; it has the same effect in all languages.

    Raises:
        ValueError: a language or a key of `sizes` is unknown, or there are too few facts.
    """
    wanted = DEFAULT_SIZES if sizes is None else sizes
    languages = {"source": source_language, "target": target_language}
    unknown = [side for side in wanted if side not in languages]
    if unknown:
        raise ValueError(f"sizes are given for 'source' and 'target', got {unknown[0]!r}")
    for language in languages.values():
        _check_language(language)
    flat = {f"{side}.{name}": n for side, part in wanted.items() for name, n in part.items()}
    block_indices = fact_split(flat, seed)
    blocks = _blocks()

    def examples_of(side: str, name: str, size: int) -> tuple[Example, ...]:
        indices = block_indices[f"{side}.{name}"]
        examples = [e for i in indices for e in _block_examples(blocks[i], languages[side])]
        return tuple(examples[:size])

    source, target = (
        {name: examples_of(side, name, size) for name, size in wanted.get(side, {}).items()}
        for side in ("source", "target")
    )
    return source, target


def _check_language(language: str) -> None:
    if language not in LANGUAGES:
        raise ValueError(
            f"no embedded questions in {language!r}, only in {', '.join(LANGUAGES)}; "
            "give files of your own"
        )


@cache
def _facts(kind: str) -> Mapping[str, Any]:
    path = files("grasp_lora.data") / "facts" / f"{kind}.json"
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def _blocks() -> tuple[_Block, ...]:
    blocks: list[_Block] = []
    for kind in KINDS:
        entities = _facts(kind)["entities"]
        # Similar entities are neighbours in the files. Pairs from the two halves mostly have
        # different values, so that a question cannot be answered without reading the passage.
        half = len(entities) // 2
        pairs = zip(entities[:half], entities[half:], strict=True)
        blocks.extend(_Block(kind, pair) for pair in pairs)
    return tuple(blocks)


def _block_examples(block: _Block, language: str) -> list[Example]:
    return [
        example
        for attributes in _facts(block.kind)["passages"]
        for example in _passage_examples(block, attributes, language)
    ]


def _passage_examples(block: _Block, attributes: Sequence[str], language: str) -> list[Example]:
    facts = [(entity, attribute) for entity in block.entities for attribute in attributes]
    # The seed is made from the facts, so that the order is the same in all languages.
    ids = [f"{block.kind}.{entity['id']}.{attribute}" for entity, attribute in facts]
    order = random.Random(" ".join(ids)).sample(range(len(facts)), len(facts))
    sentences = [_fill(block.kind, *facts[index], "sentence", language) for index in order]
    context = ("" if language in _NO_SPACES else " ").join(sentences)
    return [
        Example(
            id=ids[index],
            group=text_key(context),
            language=language,
            fields={
                "context": context,
                "question": _fill(block.kind, *facts[index], "question", language),
            },
            references=(_value(block.kind, *facts[index], language)[1],),
        )
        for index in order
    ]


def _fill(kind: str, entity: Mapping[str, Any], attribute: str, part: str, language: str) -> str:
    """Return a sentence or question, filled in with the entity's name and value in a language."""
    template = _facts(kind)["attributes"][attribute][part][language]
    if isinstance(template, dict):
        template = template[entity["gender"]]
    name = entity["name"][LANGUAGES.index(language)]
    return template.format(
        name=name,
        Name=name[0].upper() + name[1:],
        of=entity.get("of", {}).get(language, ""),
        value="".join(_value(kind, entity, attribute, language)),
    )


def _value(kind: str, entity: Mapping[str, Any], attribute: str, language: str) -> tuple[str, str]:
    """Return (article of a value or "", the value)."""
    table = _facts(kind)["attributes"][attribute].get("values")
    value = entity[attribute] if table is None else table[entity[attribute]]
    text = value if isinstance(value, str) else value[LANGUAGES.index(language)]
    article, mark, rest = text.partition("^")
    return (article, rest) if mark else ("", text)
