"""Sets that are similar, found without comparing every pair: prefix filtering, which is exact.

Two sets with a high Jaccard similarity share one of their rarest members, so only sets that do are
compared. The filters by prefix, size and position are those of PPJoin (Xiao et al., WWW 2008).
"""

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-9
"""What bounds give way by, so that no pair at the threshold is lost to rounding."""
_AT_ONCE = (64, 4096)
"""Candidates compared at once: in the first piece of a list, and at most."""


@dataclass(frozen=True)
class Sets:
    """Sets of whole numbers. The rarest member of all sets is 0, so a set begins with its rarest.

    Attributes:
        starts: [n + 1], where each set begins in `members`.
        members: [total], the members of all sets, ascending within each.
        count: number of distinct members.
    """

    starts: NDArray[np.int64]
    members: NDArray[np.int64]
    count: int

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Number of members of each set, [n]."""
        return np.diff(self.starts)


def sets_of_shingles(texts: Iterable[Sequence[Hashable]], width: int) -> Sets:
    """Return the set of shingles of each text: of every `width` tokens in a row.

    Args:
        texts: tokens of each text; a text of fewer than `width` tokens has no shingle.
        width: tokens of a shingle.
    """
    known: dict[Hashable, int] = {}
    tokens: list[NDArray[np.int32]] = []
    for text in texts:
        numbers = (known.setdefault(token, len(known)) for token in text)
        tokens.append(np.fromiter(numbers, np.int32, len(text)))
    lengths = np.array([len(text) for text in tokens], np.int64)
    owners = np.repeat(np.arange(len(tokens), dtype=np.int32), lengths)
    stream = np.concatenate([*tokens, np.empty(0, np.int32)])
    del tokens
    codes, count = stream.astype(np.int64), len(known) + 1
    for step in range(1, width):
        # A shingle's number is made from that of the shorter one and the next token.
        if count * (len(known) + 1) > np.iinfo(np.int64).max:
            count = _number(codes)
        codes = codes[: max(0, len(stream) - step)] * (len(known) + 1)
        codes += stream[step:]
        count *= len(known) + 1
    inside = owners[: len(codes)] == owners[len(owners) - len(codes) :]
    owners, codes = owners[: len(codes)][inside], codes[inside]
    del stream, inside
    count = max(1, _number(codes))
    codes += owners * np.int64(count)
    del owners
    return _by_rarity(codes, count, len(lengths))


# There are as many shingles as words in all texts, so the arrays are changed in place.


def _number(codes: NDArray[np.int64]) -> int:
    """Replace codes by numbers from 0 on, equal where they are equal; return how many there are."""
    order = np.argsort(codes)
    ordered = codes[order]
    new = _begins(ordered)
    del ordered
    codes[order] = np.cumsum(new, dtype=np.int32) - 1
    return int(new.sum())


def _begins(ordered: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return where another value begins in sorted values."""
    new = np.ones(len(ordered), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=new[1:])
    return new


def _by_rarity(pairs: NDArray[np.int64], count: int, n: int) -> Sets:
    """Return the sets of members that are numbered by how many sets have them.

    Args:
        pairs: set * `count` + member; changed in place.
        count: number of distinct members, at least 1.
        n: number of sets.
    """
    pairs.sort()
    pairs = pairs[_begins(pairs)]
    owners = (pairs // count).astype(np.int32)
    pairs %= count
    often = np.bincount(pairs, minlength=count)
    rank = np.empty(count, np.int64)
    rank[np.argsort(often, kind="stable")] = np.arange(count)
    pairs = rank[pairs]
    pairs += owners * np.int64(count)
    pairs.sort()
    pairs %= count
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=n))])
    return Sets(starts.astype(np.int64), pairs, count)


class SimilarSets:
    """Answers which sets have a Jaccard similarity of at least `threshold` with a given one.

    Args:
        sets: the sets; an empty one is similar to none.
        threshold: in (0, 1].
    """

    def __init__(self, sets: Sets, threshold: float):
        self._sets, self._sizes, self._threshold = sets, sets.sizes, threshold
        least = np.maximum(1, np.ceil(threshold * self._sizes * (1 - _ROUNDING)))
        self._prefixes = np.where(self._sizes > 0, self._sizes - least.astype(np.int64) + 1, 0)
        # Lists of one member are searched by size, so both are in one sorted key.
        self._scale = int(self._sizes.max(initial=0)) + 1
        numbers = np.repeat(np.arange(len(self._sizes)), self._prefixes)
        begins = np.cumsum(self._prefixes) - self._prefixes
        places = np.arange(len(numbers)) - np.repeat(begins, self._prefixes)
        members = sets.members[sets.starts[numbers] + places]
        order = np.lexsort((numbers, self._sizes[numbers], members))
        self._numbers, self._places = numbers[order], places[order]
        self._keys = members[order] * self._scale + self._sizes[self._numbers]
        self._marked = np.zeros(sets.count, np.bool_)

    def similar(self, number: int, among: NDArray[np.bool_]) -> Iterator[tuple[int, float]]:
        """Yield (number of a set, similarity) of the sets similar to one, each once.

        Args:
            number: the set.
            among: [n], the sets to look at; the caller may take out sets between two results.
        """
        start, size = self._sets.starts[number], int(self._sizes[number])
        own = self._sets.members[start : start + size]
        seen: set[int] = set()
        for place, at, end in self._lists(own[: self._prefixes[number]], size):
            for found in _pieces(at, end):
                others = self._numbers[found]
                shared_at_most = 1 + np.minimum(
                    size - place - 1, self._sizes[others] - self._places[found] - 1
                )
                wanted = self._overlap(size, self._sizes[others])
                others = others[among[others] & (shared_at_most >= wanted) & (others != number)]
                new = [other for other in others.tolist() if other not in seen]
                seen.update(new)
                yield from self._above_threshold(own, new)

    def _lists(self, prefix: NDArray[np.int64], size: int) -> list[tuple[int, int, int]]:
        """Return (place in the prefix, begin, end) of the lists to look at, of its members.

        Of each list it is the part whose sets have a size that allows the threshold. Lists are left
        out where that is at most the set itself.

        Args:
            prefix: the first members of a set.
            size: number of all its members.
        """
        t, places = self._threshold, np.arange(len(prefix))
        low = max(0, math.floor(t * size * (1 - _ROUNDING)))
        # What both share is at most what is left of the set, from this member on.
        high = np.ceil((size - places) * (1 + t) / t * (1 + _ROUNDING)).astype(np.int64) - size
        start = prefix * self._scale
        begins = np.searchsorted(self._keys, start + low, "left")
        ends = np.searchsorted(self._keys, start + np.clip(high, -1, self._scale - 1), "right")
        kept = np.flatnonzero(ends - begins > (high >= size))
        return list(zip(kept.tolist(), begins[kept].tolist(), ends[kept].tolist(), strict=True))

    def _overlap(self, size: int, others: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the least number of shared members that reaches the threshold."""
        return np.ceil(self._threshold / (1 + self._threshold) * (size + others) * (1 - _ROUNDING))

    def _above_threshold(
        self, own: NDArray[np.int64], others: list[int]
    ) -> Iterator[tuple[int, float]]:
        if not others:
            return
        sizes = self._sizes[others]
        begins = np.cumsum(sizes) - sizes
        places = np.arange(int(sizes.sum())) + np.repeat(self._sets.starts[others] - begins, sizes)
        self._marked[own] = True
        shared = np.add.reduceat(self._marked[self._sets.members[places]].astype(np.int64), begins)
        self._marked[own] = False
        similarity = shared / (len(own) + sizes - shared)
        for at in np.flatnonzero(similarity >= self._threshold).tolist():
            yield others[at], float(similarity[at])


def _pieces(at: int, end: int) -> Iterator[slice]:
    """Yield a range in pieces, of which each is longer than the one before, up to a bound."""
    length, most = _AT_ONCE
    while at < end:
        yield slice(at, min(end, at + length))
        at, length = at + length, min(2 * length, most)
