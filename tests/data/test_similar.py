import random
from itertools import combinations

import numpy as np
import pytest

from grasp_lora.data.similar import SimilarSets, sets_of_shingles


def shingles(text, width):
    return {tuple(text[i : i + width]) for i in range(len(text) - width + 1)}


def texts_alike(draw):
    """Texts of many kinds: empty, short, equal, with changed words, nested, of few words."""
    length, few = draw.choice([0, 1, 2, 3, 5, 30, 60]), draw.choice([2, 5, 1000])
    base = [draw.randrange(few) for _ in range(length)]
    found = [base]
    for _ in range(draw.randrange(4)):
        copy = list(draw.choice(found))
        for _ in range(draw.randrange(5)):
            if copy:
                copy[draw.randrange(len(copy))] = draw.randrange(few)
        start = draw.randrange(len(copy) + 1) if draw.random() < 0.3 else 0
        found.append(copy[start:] + [draw.randrange(few)] * draw.randrange(3))
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("threshold", [1e-9, 0.1, 1 / 3, 0.5, 2 / 3, 0.8, 0.95, 1.0])
def test_similar_sets_are_those_that_comparing_all_pairs_finds(seed, threshold):
    draw = random.Random(f"{seed} {threshold}")
    width = draw.choice([1, 2, 3, 5])
    texts = [text for _ in range(12) for text in texts_alike(draw)]
    sets = [shingles(text, width) for text in texts]
    wanted = {}
    for one, two in combinations(range(len(texts)), 2):
        union = len(sets[one] | sets[two])
        similarity = len(sets[one] & sets[two]) / union if union else 0.0
        if similarity >= threshold:
            wanted[one, two] = similarity
    index = SimilarSets(sets_of_shingles(texts, width), threshold)
    every = np.ones(len(texts), np.bool_)
    found = [(n, *pair) for n in range(len(texts)) for pair in index.similar(n, every)]
    assert len(found) == 2 * len(wanted)
    assert {(one, two): same for one, two, same in found if one < two} == wanted
    assert {(two, one): same for one, two, same in found if one > two} == wanted


def test_only_the_sets_to_look_at_are_found():
    index = SimilarSets(sets_of_shingles(["abcdef"] * 4, 3), 0.5)
    among = np.array([True, False, True, True])
    assert sorted(index.similar(0, among)) == [(2, 1.0), (3, 1.0)]
    assert list(index.similar(0, np.zeros(4, np.bool_))) == []


@pytest.mark.parametrize("texts", [[], [""], ["", "ab"], ["ab", "", "abcd"]])
def test_texts_without_a_shingle_are_similar_to_none(texts):
    index = SimilarSets(sets_of_shingles(texts, 3), 0.1)
    every = np.ones(len(texts), np.bool_)
    assert [list(index.similar(n, every)) for n in range(len(texts))] == [[]] * len(texts)


def test_shared_members_are_numbered_by_how_rare_they_are():
    sets = sets_of_shingles(["ab", "ba", "ac", "de"], 1)
    assert sets.sizes.tolist() == [2, 2, 2, 2]
    # "c", "d" and "e" are in one text, "b" is in two, "a" in three.
    assert sets.count == 2
    assert sets.alone.tolist() == [0, 0, 1, 2]
    assert sets.starts.tolist() == [0, 2, 4, 5, 5]
    assert sets.members.tolist() == [0, 1, 0, 1, 1]


def test_shingles_of_many_different_tokens_are_told_apart():
    # Shingles of 5 tokens out of 9,000 are more than a number of 64 bits holds.
    draw = random.Random(0)
    texts = [[draw.randrange(9_000) for _ in range(60)] for _ in range(200)]
    texts += [text[:57] + [draw.randrange(9_000) for _ in range(3)] for text in texts[:20]]
    sets = [shingles(tuple(text), 5) for text in texts]
    index = SimilarSets(sets_of_shingles(texts, 5), 0.5)
    every = np.ones(len(texts), np.bool_)
    found = {(n, *pair) for n in range(len(texts)) for pair in index.similar(n, every)}
    wanted = {
        (one, two, len(sets[one] & sets[two]) / len(sets[one] | sets[two]))
        for one in range(20)
        for two in (one + 200,)
    }
    assert found == wanted | {(two, one, same) for one, two, same in wanted}
