"""Sets that are similar, found without comparing every pair: prefix filtering, which is exact.

Two sets with a high Jaccard similarity share one of their rarest members, so only sets that do are
compared. The filters by prefix, size and position are those of PPJoin (Xiao et al., WWW 2008).
"""

import math
from array import array
from collections import defaultdict
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
    """Sets of whole numbers. Of each only the members are held that another set has too.

    Attributes:
        starts: [n + 1], where each set begins in `members`.
        members: [total], ascending within each set. The rarest in all sets is 0, so a set begins
            with its rarest.
        count: number of distinct members in `members`.
        sizes: [n], number of members of each set, with those that no other set has.
    """

    starts: NDArray[np.int64]
    members: NDArray[np.int64]
    count: int
    sizes: NDArray[np.int64]

    @property
    def alone(self) -> NDArray[np.int64]:
        """Number of members of each set that no other set has, [n]."""
        return self.sizes - np.diff(self.starts)


def sets_of_shingles(texts: Iterable[Sequence[Hashable]], width: int) -> Sets:
    """Return the set of shingles of each text: of every `width` tokens in a row.

    Args:
        texts: tokens of each text; a text of fewer than `width` tokens has no shingle.
        width: tokens of a shingle.
    """
    known: defaultdict[Hashable, int] = defaultdict()
    known.default_factory = known.__len__
    tokens, ends = array("i"), array("q", [0])
    for text in texts:
        tokens.extend(map(known.__getitem__, text))
        ends.append(len(tokens))
    lengths, base = np.diff(np.array(ends)), len(known)
    stream = np.frombuffer(tokens, np.int32) if tokens else np.empty(0, np.int32)
    pairs, count = stream.astype(np.int64), base
    for step in range(1, width):
        # A shingle's number is made from that of the shorter one and the next token.
        count = _numbered_below(pairs, count, base)
        pairs = pairs[: max(0, len(stream) - step)]
        pairs *= base
        pairs += stream[step:]
        count *= base
    del known, stream, tokens
    _numbered_below(pairs, count, len(lengths))
    owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    pairs *= len(lengths)
    pairs += owners[: len(pairs)]
    # What begins in one text and ends in the next is no shingle.
    pairs[owners[: len(pairs)] != owners[len(owners) - len(pairs) :]] = -1
    del owners
    pairs.sort()
    pairs = pairs[np.searchsorted(pairs, 0) :]
    pairs = pairs[_begins(pairs)]
    return _by_rarity(pairs, len(lengths))


# There are as many shingles as words in all texts, so the arrays are changed in place.


def _numbered_below(codes: NDArray[np.int64], count: int, factor: int) -> int:
    """Number codes anew, from 0 on in their order, if their product with `factor` is too large.

    Returns:
        A number above all codes.
    """
    if count * factor <= np.iinfo(np.int64).max:
        return count
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


def _by_rarity(pairs: NDArray[np.int64], n: int) -> Sets:
    """Return the sets of members that are numbered by how many sets have them.

    Args:
        pairs: member * `n` + set, ascending and distinct; changed in place.
        n: number of sets.
    """
    new = _begins(pairs // max(1, n))
    pairs %= max(1, n)
    sizes = np.bincount(pairs, minlength=n)
    shared = ~new
    shared[:-1] |= shared[1:]
    owners = pairs[shared]
    often = np.diff(np.flatnonzero(new[shared]), append=len(owners))
    rank = np.empty(len(often), np.int64)
    rank[np.argsort(often, kind="stable")] = np.arange(len(often))
    members = np.repeat(rank, often)
    members += owners * len(often)
    members.sort()
    members %= max(1, len(often))
    starts = np.concatenate([[0], np.cumsum(np.bincount(owners, minlength=n))])
    return Sets(starts.astype(np.int64), members, len(often), sizes)


class SimilarSets:
    """Answers which sets have a Jaccard similarity of at least `threshold` with a given one.

    Args:
        sets: the sets; an empty one is similar to none.
        threshold: in (0, 1].
    """

    def __init__(self, sets: Sets, threshold: float):
        self._sets, self._sizes, self._threshold = sets, sets.sizes, threshold
        least = np.maximum(1, np.ceil(threshold * self._sizes * (1 - _ROUNDING)))
        # Of the first members, those that no other set has come first of all and lead nowhere.
        self._alone = sets.alone
        self._prefixes = np.maximum(0, self._sizes - least.astype(np.int64) + 1 - self._alone)
        # Lists of one member are searched by size, so both are in one sorted key.
        self._scale = int(self._sizes.max(initial=0)) + 1
        numbers = np.repeat(np.arange(len(self._sizes)), self._prefixes)
        begins = np.cumsum(self._prefixes) - self._prefixes
        places = np.arange(len(numbers)) - np.repeat(begins, self._prefixes)
        members = sets.members[sets.starts[numbers] + places]
        order = np.lexsort((numbers, self._sizes[numbers], members))
        self._numbers, self._places = numbers[order], (places + self._alone[numbers])[order]
        self._keys = members[order] * self._scale + self._sizes[self._numbers]
        self._marked = np.zeros(sets.count, np.bool_)

    def similar(self, number: int, among: NDArray[np.bool_]) -> Iterator[tuple[int, float]]:
        """Yield (number of a set, similarity) of the sets similar to one, each once.

        Args:
            number: the set.
            among: [n], the sets to look at; the caller may take out sets between two results.
        """
        if not self._prefixes[number]:
            return
        start, end = self._sets.starts[number : number + 2]
        own, size = self._sets.members[start:end], int(self._sizes[number])
        alone = size - len(own)
        seen: set[int] = set()
        for place, at, end in self._lists(own[: self._prefixes[number]], alone, size):
            for found in _pieces(at, end):
                others = self._numbers[found]
                shared_at_most = 1 + np.minimum(
                    size - place - 1, self._sizes[others] - self._places[found] - 1
                )
                wanted = self._overlap(size, self._sizes[others])
                others = others[among[others] & (shared_at_most >= wanted) & (others != number)]
                new = [other for other in others.tolist() if other not in seen]
                seen.update(new)
                yield from self._above_threshold(own, size, new)

    def _lists(
        self, prefix: NDArray[np.int64], alone: int, size: int
    ) -> list[tuple[int, int, int]]:
        """Return (place in the set, begin, end) of the lists to look at, of its first members.

        Of each list it is the part whose sets have a size that allows the threshold. Lists are left
        out where that is at most the set itself.

        Args:
            prefix: the first members of a set that other sets have too.
            alone: number of those before them, which no other set has.
            size: number of all its members.
        """
        t, places = self._threshold, alone + np.arange(len(prefix))
        low = max(0, math.floor(t * size * (1 - _ROUNDING)))
        # What both share is at most what is left of the set, from this member on.
        high = np.ceil((size - places) * (1 + t) / t * (1 + _ROUNDING)).astype(np.int64) - size
        start = prefix * self._scale
        begins = np.searchsorted(self._keys, start + low, "left")
        ends = np.searchsorted(self._keys, start + np.clip(high, -1, self._scale - 1), "right")
        kept = np.flatnonzero(ends - begins > (high >= size))
        return list(
            zip(places[kept].tolist(), begins[kept].tolist(), ends[kept].tolist(), strict=True)
        )

    def _overlap(self, size: int, others: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the least number of shared members that reaches the threshold."""
        return np.ceil(self._threshold / (1 + self._threshold) * (size + others) * (1 - _ROUNDING))

    def _above_threshold(
        self, own: NDArray[np.int64], size: int, others: list[int]
    ) -> Iterator[tuple[int, float]]:
        if not others:
            return
        held = self._sizes[others] - self._alone[others]
        begins = np.cumsum(held) - held
        places = np.arange(int(held.sum())) + np.repeat(self._sets.starts[others] - begins, held)
        self._marked[own] = True
        shared = np.add.reduceat(self._marked[self._sets.members[places]].astype(np.int64), begins)
        self._marked[own] = False
        similarity = shared / (size + self._sizes[others] - shared)
        for at in np.flatnonzero(similarity >= self._threshold).tolist():
            yield others[at], float(similarity[at])


def _pieces(at: int, end: int) -> Iterator[slice]:
    """Yield a range in pieces, of which each is longer than the one before, up to a bound."""
    length, most = _AT_ONCE
    while at < end:
        yield slice(at, min(end, at + length))
        at, length = at + length, min(2 * length, most)
