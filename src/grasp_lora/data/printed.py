"""Read lists and mappings of texts in the forms that Python and numpy print them in.

A table holds texts only. `DataFrame.to_csv` writes a list as Python prints it, `['a', 'b']`, and an
array as numpy does: `['a' 'b']` or, inside a mapping, `array(['a', 'b'], dtype=object)`. Python's
own parser reads the second as one text, so these forms have a parser here. It takes what they print
and nothing else.
"""

import ast
import re
from typing import Any

_DEEPEST = 4
_TOKEN = re.compile(
    r"""
    (?P<text>  (?:np\.str_\()? (?:
        '(?:[^'\\\n]|\\(?:[\\'"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}))*'
      | "(?:[^"\\\n]|\\(?:[\\'"nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8}))*" ) )
  | (?P<number> [-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)? )
  | (?P<missing> (?:None|nan)\b )
  | (?P<dtype> dtype=(?:\w+|'[^'\\\n]*') )
  | (?P<mark> \.\.\. | array\( | [\[\](){}:,] )
    """,
    re.VERBOSE,
)
_BLANK = re.compile(r"\s*")


class NotPrinted(ValueError):
    """A text is not exactly what Python or numpy print."""


class Shortened(NotPrinted):
    """numpy left entries out, which it prints as "..."."""


def printed_value(text: str) -> Any:
    """Return the list or mapping that a text is the printed form of.

    Entries are texts, numbers, None (also for nan), and again lists and mappings. Arrays and tuples
    become lists.

    Raises:
        Shortened: numpy left entries out.
        NotPrinted: the text is anything else than a printed list, tuple, array or mapping.
    """
    reader = _Reader(text)
    value = reader.value(_DEEPEST)
    if not isinstance(value, list | dict) or reader.kind:
        raise NotPrinted(text)
    return value


class _Reader:
    """Reads tokens; `kind` and `token` are the next one, `spaced` says if a blank is before it."""

    def __init__(self, text: str):
        self._text, self._end = text, 0
        self.kind: str | None = None
        self.token, self.spaced = "", False
        self._advance()

    def value(self, depth: int) -> Any:
        """Return the next value, at most `depth` lists and mappings deep."""
        kind, token = self.kind, self.token
        if kind not in ("text", "number", "missing", "mark") or depth < 0:
            raise NotPrinted(self._text)
        self._advance()
        if kind == "missing":
            return None
        if kind == "number":
            return float(token)
        if kind == "text":
            return self._plain(token)
        if token == "array(":
            return self._array(depth)
        if token == "{":
            return self._mapping(depth)
        return self._list(token, depth)

    def _plain(self, token: str) -> str:
        wrapped = token.startswith("np")
        if wrapped:
            self._expect(")")
        # The pattern of a text allows one literal, so this only resolves its escapes.
        return ast.literal_eval(token.removeprefix("np.str_("))

    def _array(self, depth: int) -> list[Any]:
        self._expect("[")
        entries = self._list("[", depth)
        if self._next_is(","):
            if self.kind != "dtype":
                raise NotPrinted(self._text)
            self._advance()
        self._expect(")")
        return entries

    def _mapping(self, depth: int) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        if self._next_is("}"):
            return entries
        while True:
            key = self.value(depth - 1)
            if not isinstance(key, str) or key in entries:
                raise NotPrinted(self._text)
            self._expect(":")
            entries[key] = self.value(depth - 1)
            if self._next_is("}"):
                return entries
            self._expect(",")

    def _list(self, opening: str, depth: int) -> list[Any]:
        """Return the entries of a list, with commas or blanks between all, or of a tuple."""
        closing = {"[": "]", "(": ")"}.get(opening)
        if closing is None:
            raise NotPrinted(self._text)
        entries: list[Any] = []
        commas: bool | None = None
        while not self._next_is(closing):
            if entries:
                comma = self.token == ","
                if comma:
                    self._advance()
                elif not self.spaced or opening == "(":
                    raise NotPrinted(self._text)
                if commas not in (None, comma):
                    raise NotPrinted(self._text)
                commas = comma
                if comma and opening == "(" and len(entries) == 1 and self._next_is(closing):
                    return entries
            entries.append(self.value(depth - 1))
        # Parentheses around one text are no tuple.
        if opening == "(" and not commas:
            raise NotPrinted(self._text)
        return entries

    def _next_is(self, mark: str) -> bool:
        found = self.kind == "mark" and self.token == mark
        if found:
            self._advance()
        return found

    def _expect(self, mark: str) -> None:
        if not self._next_is(mark):
            raise NotPrinted(self._text)

    def _advance(self) -> None:
        blank = _BLANK.match(self._text, self._end)
        start = blank.end() if blank else self._end
        self.spaced = start > self._end
        if start == len(self._text):
            self.kind, self.token, self._end = None, "", start
            return
        found = _TOKEN.match(self._text, start)
        if found is None:
            raise NotPrinted(self._text)
        if found.group() == "...":
            raise Shortened(self._text)
        self.kind, self.token, self._end = found.lastgroup, found.group(), found.end()
