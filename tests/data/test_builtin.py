import json
import re
import unicodedata
from importlib.resources import files
from itertools import combinations

import pytest

from grasp_lora.data.builtin import (
    DEFAULT_SIZES,
    KINDS,
    LANGUAGES,
    builtin_examples,
    builtin_splits,
    fact_split,
)
from grasp_lora.data.leaks import check_disjoint
from grasp_lora.tasks.records import Example, text_key

FACTS = {
    kind: json.loads((files("grasp_lora.data") / "facts" / f"{kind}.json").read_text("utf-8"))
    for kind in KINDS
}


def sentences(example: Example) -> set[str]:
    """Return the sentences of the context; each states one fact."""
    found = re.split(r"(?<=[.。])\s*", example.fields["context"])
    return {sentence for sentence in found if sentence}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_question_has_its_answer_in_a_short_passage(language: str) -> None:
    examples = builtin_examples(language)
    assert len(examples) >= 480
    assert len({example.id for example in examples}) == len(examples)
    for example in examples:
        context, question = example.fields["context"], example.fields["question"]
        (answer,) = example.references
        assert answer in context, example.id
        assert 2 <= len(sentences(example)) <= 4, example.id
        assert question.endswith(("?", "؟", "？"))
        assert example.language == language
        assert example.group == text_key(context)
        for text in (context, question, answer):
            assert unicodedata.is_normalized("NFC", text)
            assert text == " ".join(text.split())
            assert not re.search(r"[{}^|]", text), text


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_answer_stands_in_a_sentence_on_the_entity_asked_about(language: str) -> None:
    number = LANGUAGES.index(language)
    names = {
        f"{kind}.{entity['id']}": entity["name"][number]
        for kind, facts in FACTS.items()
        for entity in facts["entities"]
    }
    for example in builtin_examples(language):
        # "le Japon" is "du Japon" after "de": the last word of the name always stands.
        name = re.split(r"[\s']", names[example.id.rsplit(".", 1)[0]])[-1]
        told = [s for s in sentences(example) if name in s and example.references[0] in s]
        assert told, example.id
        assert name in example.fields["question"], example.id


@pytest.mark.parametrize(
    ("language", "name", "answer", "told"),
    [
        ("es", "country.sweden.currency", "corona", "La moneda de Suecia es la corona."),
        ("de", "country.sweden.currency", "Krone", "Die Währung von Schweden ist die Krone."),
        (
            "fr",
            "country.italy.language",
            "italien",
            "La langue principale de l'Italie est l'italien.",
        ),
        ("es", "animal.owl.class", "aves", "El búho pertenece a la clase de las aves."),
        ("en", "animal.owl.class", "birds", "The owl belongs to the class of birds."),
        ("fr", "person.curie.birth", "1867", "Marie Curie est née en 1867."),
        ("ar", "person.curie.birth", "1867", "وُلدت ماري كوري عام 1867."),
        ("zh", "element.gold.symbol", "Au", "化学元素金的符号是Au。"),
    ],
)
def test_sentences_agree_and_answers_come_without_article(
    language: str, name: str, answer: str, told: str
) -> None:
    (example,) = (e for e in builtin_examples(language) if e.id == name)
    assert example.references == (answer,)
    assert told in sentences(example)


def test_ids_order_and_shared_contexts_are_the_same_in_all_languages() -> None:
    english = builtin_examples("en")
    for language in LANGUAGES[1:]:
        other = builtin_examples(language)
        assert [example.id for example in other] == [example.id for example in english]
        first_of = {}
        for one, two in zip(english, other, strict=True):
            assert first_of.setdefault(one.group, two.group) == two.group


def test_each_fact_is_told_once_and_questions_are_of_many_kinds() -> None:
    examples = builtin_examples("en")
    relations = {(e.id.split(".")[0], e.id.split(".")[2]) for e in examples}
    assert len(relations) >= 8
    wanted = {
        f"{kind}.{entity['id']}.{attribute}"
        for kind, facts in FACTS.items()
        for entity in facts["entities"]
        for attribute in facts["attributes"]
    }
    assert {example.id for example in examples} == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_and_value_is_given_in_all_languages(kind: str) -> None:
    facts = FACTS[kind]
    assert tuple(facts["languages"]) == LANGUAGES
    for attribute, described in facts["attributes"].items():
        assert set(described["sentence"]) == set(described["question"]) == set(LANGUAGES)
        table = described.get("values")
        for entity in facts["entities"]:
            assert len(entity["name"]) == len(LANGUAGES)
            value = entity[attribute] if table is None else table[entity[attribute]]
            assert isinstance(value, str) or len(value) == len(LANGUAGES)
    for language in range(len(LANGUAGES)):
        names = [entity["name"][language] for entity in facts["entities"]]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("number", [4, 5])
def test_names_in_other_scripts_hold_no_latin_letter(number: int) -> None:
    for facts in FACTS.values():
        for entity in facts["entities"]:
            assert not re.search("[A-Za-z]", entity["name"][number]), entity["id"]


def test_elements_are_told_with_the_numbers_of_the_periodic_table() -> None:
    first = "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge"
    numbers = {symbol: str(i) for i, symbol in enumerate(first.split(), start=1)}
    known = [e for e in FACTS["element"]["entities"] if e["symbol"] in numbers]
    assert len(known) >= 30
    assert all(entity["number"] == numbers[entity["symbol"]] for entity in known)


def test_lives_begin_before_they_end() -> None:
    for person in FACTS["person"]["entities"]:
        assert 30 < int(person["death"]) - int(person["birth"]) < 100, person["id"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("languages", [("en", "es"), ("en", "en"), ("fr", "zh")])
def test_no_two_splits_share_a_fact_told_or_asked(languages: tuple[str, str], seed: int) -> None:
    source, target = builtin_splits(*languages, seed=seed)
    assert {name: len(part) for name, part in source.items()} == DEFAULT_SIZES["source"]
    assert {name: len(part) for name, part in target.items()} == DEFAULT_SIZES["target"]
    parts = {**{f"s.{k}": v for k, v in source.items()}, **{f"t.{k}": v for k, v in target.items()}}
    check_disjoint(parts)
    # Facts told, distractors included: an id's passage has the same sentences in English.
    english = {example.id: example for example in builtin_examples("en")}
    told = {
        name: set().union(*(sentences(english[example.id]) for example in part))
        for name, part in parts.items()
    }
    asked = {name: {e.id.rsplit(".", 1)[0] for e in part} for name, part in parts.items()}
    for one, two in combinations(parts, 2):
        assert not told[one] & told[two]
        assert not asked[one] & asked[two]


def test_splits_depend_on_the_seed_and_not_on_the_language() -> None:
    ids = [
        [example.id for part in builtin_splits("en", language, seed=seed)[1].values()
         for example in part]
        for language, seed in (("es", 0), ("zh", 0), ("es", 1))
    ]  # fmt: skip
    assert ids[0] == ids[1] != ids[2]


def test_one_side_may_be_left_out() -> None:
    source, target = builtin_splits("en", "de", {"target": {"train": 8, "none": 0}})
    assert source == {}
    assert {name: len(part) for name, part in target.items()} == {"train": 8, "none": 0}


def test_a_chosen_count_is_a_seeded_subset_in_the_order_of_the_set() -> None:
    every = [example.id for example in builtin_examples("ar")]
    some = [example.id for example in builtin_examples("ar", count=50, seed=3)]
    assert len(some) == len(set(some)) == 50
    assert some == [name for name in every if name in set(some)]
    assert some == [example.id for example in builtin_examples("en", count=50, seed=3)]
    assert some != [example.id for example in builtin_examples("ar", count=50, seed=4)]
    assert builtin_examples("ar", count=0) == []


def test_too_much_is_refused_with_the_numbers() -> None:
    with pytest.raises(ValueError, match=r"count must be in 0..580, got 581"):
        builtin_examples("en", count=581)
    with pytest.raises(ValueError, match="need 600 of 580"):
        fact_split({"a": 300, "b": 300}, 0)
    with pytest.raises(ValueError, match="0 or more, got -1"):
        fact_split({"a": -1}, 0)


def test_unknown_languages_and_sides_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'sw'.*en, es, de, fr, ar, zh"):
        builtin_examples("sw")
    with pytest.raises(ValueError, match="'fi'"):
        builtin_splits("en", "fi")
    with pytest.raises(ValueError, match="got 'both'"):
        builtin_splits("en", "es", {"both": {"train": 1}})
