"""Read YAML, and keep how a value was written where YAML reads it as something else than text.

YAML 1.1 reads `no`, `on`, `2023` and `1.10` without quotes as false, true and numbers, so the
language `no` is lost. A message on a setting that must be text needs the word of the file.
"""

from dataclasses import dataclass, field
from typing import Any

import yaml

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


_StrictLoader.add_constructor("tag:yaml.org,2002:map", _mapping_without_doubles)


def read_yaml(text: str) -> tuple[Any, Words]:
    """Return the plain values of a YAML text, like `yaml.safe_load`, and the words in it.

    Raises:
        yaml.YAMLError: the text is not YAML, or a key occurs twice in the same place.
    """
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, Words()
        try:
            values = loader.construct_document(node)
        except (ValueError, TypeError, OverflowError) as error:  # such as the date 2023-13-45
            raise yaml.YAMLError(str(error)) from None
        words = Words()
        _collect(node, values, (), words, set())
        return values, words
    finally:
        loader.dispose()


def yaml_fault(error: yaml.YAMLError) -> str:
    """Return in one line what is wrong with a text that is not YAML, and what to do."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    problem, mark = str(error.problem), error.problem_mark
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
