"""Read YAML, and keep how a value was written where YAML reads it as something else than text.

YAML 1.1 reads `no`, `on`, `2023` and `1.10` without quotes as false, true and numbers, so the
language `no` is lost. A message on a setting that must be text needs the word of the file.

A small text can stand for values without end, by aliases, or for ones that no code can walk
through. Such a text is refused before its values are made.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from grasp_lora.base.words import shown

LONGEST = 1_000_000
"""Characters of a text."""
MOST_VALUES = 10_000
"""Values that a text may stand for, with those that its aliases repeat."""
DEEPEST = 50
"""Levels of lists and blocks within each other."""
_PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
_HALF = re.compile("[\ud800-\udfff]")

KeyPath = tuple[str, ...]
"""Keys and positions, as text, that lead to a value."""


@dataclass
class Words:
    """The values and keys that YAML does not read as text, as they were written.

    Attributes:
        values: path of a value -> its word, such as `no`.
        keys: path of a key, which is last in it -> its word.
        options: paths of the settings whose value the command line gave.
    """

    values: dict[KeyPath, str] = field(default_factory=dict)
    keys: dict[KeyPath, str] = field(default_factory=dict)
    options: set[KeyPath] = field(default_factory=set)

    def add_option(self, path: KeyPath, given: "Words") -> None:
        """Add the words in the value that `--set` gives to the setting at `path`."""
        self.values |= {path + below: word for below, word in given.values.items()}
        self.keys |= {path + below: word for below, word in given.keys.items()}
        self.options.add(path)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice; YAML itself would silently keep the last."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, OverflowError, LookupError, AttributeError) as error:
            # Such as the date 2023-13-45, or !!bool abc.
            line, word = node.start_mark.line + 1, shown(str(node.value))
            tagged = not isinstance(error, ValueError | OverflowError)
            why = "it does not fit its tag" if tagged else _short_of_digits(error)
            do = "take the tag out" if tagged else "put it in quotes if it is meant as text"
            raise yaml.YAMLError(f"line {line}: {word} cannot be read: {why}; {do}") from None


def _mapping_without_doubles(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    seen: set[Any] = set()
    for key_node, _ in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.YAMLError(f"line {line}: a key must be one word, not a list or a block")
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.YAMLError(f"line {line}: {key!r} is given twice; remove one of them")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _text(loader: _StrictLoader, node: yaml.ScalarNode) -> str:
    """Return a text; JSON writes a character beyond U+FFFF as two escapes, which are joined."""
    text = _PAIR.sub(lambda pair: _joined(pair[0]), str(loader.construct_scalar(node)))
    if _HALF.search(text):
        line = node.start_mark.line + 1
        raise yaml.YAMLError(
            f"line {line}: a text holds half of a character (\\ud800 to \\udfff); write it whole"
        )
    return text


def _joined(pair: str) -> str:
    return pair.encode("utf-16-le", "surrogatepass").decode("utf-16-le")


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_doubles)
_StrictLoader.add_constructor("tag:yaml.org,2002:str", _text)


def read_yaml(text: str) -> tuple[Any, Words]:
    """Return the plain values of a YAML text, like `yaml.safe_load`, and the words in it.

    Raises:
        yaml.YAMLError: the text is not YAML, a key occurs twice in the same place, or the text
            stands for more than `MOST_VALUES` values or for more than `DEEPEST` levels.
    """
    if len(text) > LONGEST:
        raise yaml.YAMLError(f"{len(text)} characters are no configuration; {LONGEST} at most")
    _check_depth(text)
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, Words()
        _extent(node, {})
        values = loader.construct_document(node)
        words = Words()
        _collect(node, values, (), words, set())
        return values, words
    finally:
        loader.dispose()


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST:
            raise _too_deep(event.start_mark)


def _too_deep(mark: yaml.Mark) -> yaml.YAMLError:
    return yaml.YAMLError(
        f"line {mark.line + 1}: lists and blocks are nested more than {DEEPEST} levels deep; write "
        "settings plainly"
    )


def _short_of_digits(error: Exception) -> str:
    """Return what is wrong with a value; Python's advice on long numbers helps no one here."""
    return "a number has thousands of digits" if "digits" in str(error) else str(error)


def _extent(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return how many values and levels a node stands for, an alias counted as what it repeats.

    Raises:
        yaml.YAMLError: they are too many, or a node holds itself.
    """
    if id(node) not in known:
        known[id(node)] = (MOST_VALUES, 0)  # of one that holds itself
        below: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            below = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            below = node.value
        found = [_extent(one, known) for one in below]
        depth = 1 + max((depth for _, depth in found), default=0)
        known[id(node)] = 1 + sum(count for count, _ in found), depth
    count, depth = known[id(node)]
    if count > MOST_VALUES:
        raise yaml.YAMLError(
            f"line {node.start_mark.line + 1}: the text stands for more than {MOST_VALUES} values, "
            "as aliases (*name) repeat others; write the values themselves"
        )
    if depth > DEEPEST:
        raise _too_deep(node.start_mark)
    return count, depth


def yaml_fault(error: yaml.YAMLError) -> str:
    """Return in one line what is wrong with a text that is not YAML, and what to do."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    problem, mark = str(error.problem), error.problem_mark
    if "duplicate anchor" in str(error.context):
        problem = f"{str(error.context).split(';')[0].removeprefix('found ')}; name it otherwise"
    if "constructor for the tag" in problem:
        problem = f"the tag {problem.split()[-1]} is not allowed; take it out"
    if "escape" in problem:
        problem += (
            "; in double quotes a backslash begins an escape: write a path in single quotes, or "
            "with / in place of \\"
        )
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def _collect(node: yaml.Node, value: Any, path: KeyPath, words: Words, seen: set[int]) -> None:
    """Add the words below a node; what an alias repeats is looked through once."""
    if isinstance(node, yaml.ScalarNode):
        if value is not None and not isinstance(value, str):
            words.values[path] = node.value
        return
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode) and isinstance(value, dict):
        # Both have the same order, because no key occurs twice.
        for (key_node, child), (key, item) in zip(node.value, value.items(), strict=True):
            below = (*path, str(key))
            if not isinstance(key, str):
                words.keys[below] = key_node.value
            _collect(child, item, below, words, seen)
    elif isinstance(node, yaml.SequenceNode) and isinstance(value, list):
        for position, (child, item) in enumerate(zip(node.value, value, strict=True)):
            _collect(child, item, (*path, str(position)), words, seen)
