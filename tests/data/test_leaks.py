import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from unicodedata import normalize

import pytest

from grasp_lora.data.builtin import LANGUAGES, builtin_splits
from grasp_lora.data.files import load_examples
from grasp_lora.data.leaks import Leak, check_disjoint, drop_parallel, find_leaks, refuse_leaks
from grasp_lora.data.repeats import drop_repeated_texts
from grasp_lora.tasks.base import TASKS
from grasp_lora.tasks.records import Example, text_key

DATA = Path(__file__).parents[2].parent / "shared" / "data"
needs_data = pytest.mark.skipif(
    not DATA.is_dir(), reason="the published files are not beside the repository"
)

ENGLISH = (
    "The old harbour of the town was closed for repairs last winter, and the fishermen moored "
    "their boats further up the river, where the water is calm. Every morning a small bus took "
    "them to the market hall, in which the catch of the night was sold before breakfast."
)
ARABIC = (
    "أغلق الميناء القديم في المدينة للإصلاح في الشتاء الماضي، فأرسى الصيادون قواربهم في أعلى "
    "النهر حيث المياه هادئة. وكانت حافلة صغيرة تنقلهم كل صباح إلى قاعة السوق التي يباع فيها "
    "صيد الليل قبل الفطور، ثم يعودون إلى بيوتهم قبل أن يشتد الحر في الظهيرة."
)
CHINESE = (
    "去年冬天，城里的老码头因维修而关闭，渔民们把船停在水流平缓的上游。每天早晨，一辆小巴士把他们送到"
    "市场大厅，夜里捕到的鱼在早餐之前就在那里卖完。中午天气变热之前，他们便回到自己的家中休息。"
)
THAI = (
    "เมื่อฤดูหนาวที่แล้วท่าเรือเก่าของเมืองปิดซ่อมแซม ชาวประมงจึงจอดเรือไว้ทางต้นน้ำซึ่งน้ำนิ่งกว่า "
    "ทุกเช้ารถโดยสารคันเล็กจะพาพวกเขาไปยังตลาดที่ขายปลาซึ่งจับได้ในตอนกลางคืนก่อนเวลาอาหารเช้า"
)
CHANGED = {
    "en": (ENGLISH, ENGLISH.replace("small bus", "little bus")),
    "ar": (ARABIC, ARABIC.replace("حافلة صغيرة", "حافلة كبيرة")),
    "zh": (CHINESE, CHINESE.replace("小巴士", "大巴士")),
    "th": (THAI, THAI.replace("คันเล็ก", "คันใหญ่")),
}


def row(
    name: str, context: str, question: str = "q", language: str = "en", group: str | None = None
) -> Example:
    fields = {"context": context, "question": question}
    return Example(name, group or text_key(context), language, fields, ("a",))


def words(*numbers: int) -> str:
    return " ".join(f"word{number}" for number in numbers)


def kinds(leaks: Sequence[Leak]) -> list[str]:
    return [leak.kind for leak in leaks]


def test_the_same_id_in_two_splits_is_a_leak_in_any_language() -> None:
    parts = {"source/train": [row("1", "a")], "target/test": [row("1", "ب", language="ar")]}
    assert find_leaks(parts) == [Leak("id", ("source/train", "1"), ("target/test", "1"), 1.0)]


@pytest.mark.parametrize("other", ["a  b", "\u00a0a\u3000b ", "\uff41 b", "\ufeffa b"])
def test_the_same_context_in_another_form_is_one_group(other: str) -> None:
    parts = {"train": [row("1", "a b", "x")], "dev": [row("2", "c"), row("3", other, "y")]}
    assert find_leaks(parts) == [Leak("group", ("train", "1"), ("dev", "3"))]


@pytest.mark.parametrize("other", ["A, B!", "\u201ca\u201d b.", "a\u200b-b", "\uff21\uff22"])
def test_texts_that_differ_in_case_punctuation_and_spaces_are_the_same(other: str) -> None:
    parts = {"train": [row("1", "a b")], "dev": [row("2", other, language="fr")]}
    assert find_leaks(parts) == [Leak("text", ("train", "1"), ("dev", "2"))]


@pytest.mark.parametrize(
    ("one", "two"), [("a b", "a c"), ("कि", "का"), ("3+4", "34"), ("...", "!!!"), ("naïf", "naif")]
)
def test_texts_that_differ_otherwise_are_not_the_same(one: str, two: str) -> None:
    assert find_leaks({"train": [row("1", one)], "dev": [row("2", two)]}) == []


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("ﺍﻟﻘﺎﻫﺮﺓ مدينة", "القاهرة مدينة"),
        ("القـــاهرة مدينة", "القاهرة مدينة"),
        ("القَاهِرَة مدينةٌ", "القاهرة مدينة"),
        ("\u200fالقاهرة\u202c مدينة", "القاهرة مدينة"),
        (normalize("NFD", "thành phố"), "thành phố"),
        ("ـ...", "..."),
    ],
)
def test_texts_in_another_form_are_the_same(one: str, two: str) -> None:
    (leak,) = find_leaks({"train": [row("1", one, group="a")], "dev": [row("2", two, group="b")]})
    assert (leak.kind, leak.first, leak.second) == ("text", ("train", "1"), ("dev", "2"))


def test_a_text_in_another_form_is_found_as_near() -> None:
    one, two = CHANGED["ar"]
    written = "\u200f" + two.replace("ا", "ـا").replace("ي", "ﻱ").replace("ب", "بَ")
    parts = {"train": [row("1", one, language="ar")], "dev": [row("2", written, language="ar")]}
    plain = {"train": [row("1", one, language="ar")], "dev": [row("2", two, language="ar")]}
    assert find_leaks(parts) == find_leaks(plain) != []


def test_ids_and_groups_in_another_form_are_the_same() -> None:
    one = row("câu", "a b", group="x")
    two = row(normalize("NFD", "câu"), "c d", group="y")
    assert kinds(find_leaks({"train": [one], "dev": [two]})) == ["id"]
    assert drop_parallel([one], [two]) == ((), 1)
    other = row("2", "c d", group="x\u200e")
    assert kinds(find_leaks({"train": [one], "dev": [other]})) == ["group"]


def test_rows_of_one_split_may_share_a_context_and_questions_may_recur() -> None:
    near = [row(str(i), text, "x") for i, text in enumerate((ENGLISH, *CHANGED["en"]))]
    assert find_leaks({"train": near, "dev": [row("9", "b", "x")], "test": []}) == []
    assert find_leaks({}) == []
    assert find_leaks({"train": [row("1", "a"), row("1", "a")]}) == []


@pytest.mark.parametrize("language", CHANGED)
def test_a_text_with_a_word_changed_is_found_as_near(language: str) -> None:
    one, two = CHANGED[language]
    assert one != two
    parts = {
        "train": [row("other", CHANGED[language][0][::-1], language=language)]
        + [row("1", one, language=language)],
        "test": [row("2", two, language=language)],
    }
    (leak,) = find_leaks(parts)
    assert (leak.kind, leak.first, leak.second) == ("near", ("train", "1"), ("test", "2"))
    assert 0.8 <= leak.similarity < 1


def test_near_texts_of_two_languages_are_not_compared() -> None:
    one, two = CHANGED["en"]
    assert find_leaks({"train": [row("1", one)], "dev": [row("2", two, language="de")]}) == []


def test_similarity_is_that_of_word_triples() -> None:
    # 20 words have 18 triples. With the last two words changed 16 of them stay: 16 of 20 in all.
    one, two = words(*range(20)), words(*range(18), 98, 99)
    parts = {"train": [row("1", one)], "dev": [row("2", two)]}
    (leak,) = find_leaks(parts, threshold=0.8)
    assert leak.similarity == 0.8
    assert find_leaks(parts, threshold=0.801) == []


def test_similarity_of_unsegmented_text_is_that_of_five_characters() -> None:
    # 40 characters have 36 fives; with 4 characters more there are 40, of which 36 are shared.
    one = "".join(chr(0x4E00 + 7 * i) for i in range(40))
    two = one + "".join(chr(0x7000 + i) for i in range(4))
    parts = {"train": [row("1", one, language="zh")], "dev": [row("2", two, language="zh")]}
    (leak,) = find_leaks(parts, threshold=0.9)
    assert leak.similarity == 0.9
    assert find_leaks(parts, threshold=0.901) == []


@pytest.mark.parametrize(("shared", "size"), [(11, 20), (7, 25), (9, 10), (3, 4)])
def test_no_pair_is_lost_to_rounding_at_the_threshold(shared: int, size: int) -> None:
    # The shorter text begins the longer one, so that the similarity is shared / size.
    short, long = words(*range(shared * 4 + 2)), words(*range(size * 4 + 2))
    parts = {"train": [row("1", short)], "dev": [row("2", long)]}
    (leak,) = find_leaks(parts, threshold=shared / size)
    assert leak.similarity == shared / size


def test_short_texts_are_compared_for_equality_only() -> None:
    def leaks(count: int) -> list[Leak]:
        one, two = words(*range(count)), words(*range(count), 0, 1)
        return find_leaks({"train": [row("1", one)], "dev": [row("2", two)]}, threshold=0.5)

    assert kinds(leaks(10)) == ["near"]
    assert leaks(9) == []
    short = {"train": [row("1", words(1, 2))], "dev": [row("2", words(1, 2) + "!")]}
    assert kinds(find_leaks(short)) == ["text"]


def test_near_pairs_are_those_that_comparing_all_pairs_finds() -> None:
    draw = random.Random(5)
    texts: list[list[int]] = []
    for _ in range(60):
        base = [draw.randrange(10_000) for _ in range(80)]
        texts.append(base)
        copy = list(base)
        for _ in range(draw.randrange(12)):
            copy[draw.randrange(80)] = draw.randrange(10_000)
        texts.append(copy)
    examples = [row(str(i), words(*numbers)) for i, numbers in enumerate(texts)]
    parts = {name: examples[i::4] for i, name in enumerate("abcd")}
    triples = [set(zip(t, t[1:], t[2:], strict=False)) for t in texts]

    def similarity(i: int, j: int) -> float:
        return len(triples[i] & triples[j]) / len(triples[i] | triples[j])

    pairs = {(i, j) for i, j in combinations(range(len(texts)), 2) if (i - j) % 4}
    for threshold in (0.3, 0.5, 0.8):
        wanted = {p for p in pairs if texts[p[0]] != texts[p[1]] and similarity(*p) >= threshold}
        found = [leak for leak in find_leaks(parts, threshold=threshold) if leak.kind == "near"]
        ids = {tuple(sorted((int(leak.first[1]), int(leak.second[1])))) for leak in found}
        assert ids == wanted
        assert len(wanted) > 5
        for leak in found:
            assert leak.similarity == similarity(int(leak.first[1]), int(leak.second[1]))


def test_a_context_pair_is_reported_once_by_its_first_rows_however_many_questions_it_has() -> None:
    one, two = CHANGED["en"]
    parts = {
        "train": [row(f"a{i}", one) for i in range(4)],
        "dev": [row(f"b{i}", two) for i in range(3)],
        "test": [row("c0", one.upper())],
    }
    leaks = find_leaks(parts)
    assert [(leak.kind, leak.first[1], leak.second[1]) for leak in leaks] == [
        ("text", "a0", "c0"),
        ("near", "a0", "b0"),
        ("near", "b0", "c0"),
    ]


def test_groups_that_share_an_id_are_not_reported_a_second_time() -> None:
    parts = {
        "train": [row("1", ENGLISH), row("2", ENGLISH), row("3", ENGLISH)],
        "dev": [row("9", ENGLISH), row("2", ENGLISH), row("3", ENGLISH)],
    }
    assert [(leak.kind, leak.first[1]) for leak in find_leaks(parts)] == [("id", "2"), ("id", "3")]


def test_a_group_named_by_the_user_is_kept_together() -> None:
    parts = {"train": [row("1", "a", group="g")], "dev": [row("2", "b", group="g")]}
    assert kinds(find_leaks(parts)) == ["group"]


def test_rows_without_a_context_are_compared_by_all_their_inputs() -> None:
    def example(name: str, text: str) -> Example:
        return Example(name, name, "en", {"instruction": "Translate.", "text": text}, ("a",))

    parts = {"train": [example("1", "one")], "dev": [example("2", "two"), example("3", "One")]}
    assert find_leaks(parts) == [Leak("text", ("train", "1"), ("dev", "3"))]


def test_leaks_are_the_same_each_time_and_the_strongest_kind_comes_first() -> None:
    one, two = CHANGED["en"]
    parts = {
        "a": [row("1", one), row("2", "x y"), row("3", "c")],
        "b": [row("4", two), row("5", "X, y"), row("3", "d")],
    }
    leaks = find_leaks(parts)
    assert kinds(leaks) == ["id", "text", "near"]
    assert find_leaks(parts) == leaks
    assert asdict(leaks[0]) == {
        "kind": "id", "first": ("a", "3"), "second": ("b", "3"), "similarity": 1.0
    }  # fmt: skip


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.1, float("nan")])
def test_thresholds_outside_the_range_are_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=r"in \(0, 1\], got"):
        find_leaks({}, threshold=threshold)


def test_threshold_one_still_finds_texts_of_the_same_triples() -> None:
    # The same words told twice over have the triples of those told three times.
    one, two = words(*range(12), *range(12)), words(*range(12), *range(12), *range(12))
    parts = {"train": [row("1", one)], "dev": [row("2", two)]}
    assert [leak.similarity for leak in find_leaks(parts, threshold=1.0)] == [1.0]


def test_a_leak_is_refused_with_its_count_its_rows_and_the_way_on() -> None:
    one, two = CHANGED["en"]
    parts = {"train": [row("1", "a"), row("2", one)], "dev": [row("1", "b"), row("3", two)]}
    with pytest.raises(ValueError, match="2 pairs of rows in two splits") as caught:
        check_disjoint(parts)
    text = str(caught.value)
    assert "(the same id: 1, nearly the same text: 1)" in text
    assert "'1' of train and '1' of dev (the same id)" in text
    assert "'2' of train and '3' of dev (nearly the same text, similarity 0." in text
    assert "different ids, or pass --allow-leakage" in text
    assert kinds(check_disjoint(parts, allow=True)) == ["id", "near"]
    assert check_disjoint(parts | {"dev": []}) == ()
    assert kinds(check_disjoint(parts, allow=True, threshold=1.0)) == ["id"]


def test_only_the_first_five_of_many_leaks_are_named() -> None:
    leaks = [Leak("group", ("train", f"t{i}"), ("dev", f"d{i}")) for i in range(7)]
    with pytest.raises(ValueError, match="7 pairs .*'t4' of train.*; and 2 more; give") as caught:
        refuse_leaks(leaks)
    assert "t5" not in str(caught.value)
    assert "different ids" not in str(caught.value)


def test_an_empty_context_is_no_text_that_rows_share() -> None:
    rows = {
        split: [Example(split, split, "en", {"context": "", "task": f"Count {split}."}, ("a",))]
        for split in ("train", "test")
    }
    assert find_leaks(rows) == []
    same = {split: [replace(one[0], fields={"context": "", "task": "Count."})]
            for split, one in rows.items()}  # fmt: skip
    assert [leak.kind for leak in find_leaks(same)] == ["text"]


def test_parallel_rows_go_with_their_whole_context() -> None:
    rows = [row("1", "a", "x"), row("2", "a", "y"), row("3", "b"), row("4", "c"), row("5", "c")]
    used = [row("2", "ا", language="ar"), row("7", "ب", language="ar")]
    kept, dropped = drop_parallel(rows, used)
    assert [example.id for example in kept] == ["3", "4", "5"]
    assert dropped == 2
    assert drop_parallel(rows, []) == (tuple(rows), 0)
    assert drop_parallel([], used) == ((), 0)


@pytest.mark.parametrize("source", LANGUAGES)
def test_the_embedded_questions_do_not_leak_in_any_pair_of_languages(source: str) -> None:
    for target in LANGUAGES:
        sides = builtin_splits(source, target)
        parts = {f"{i}/{name}": rows for i, side in enumerate(sides) for name, rows in side.items()}
        assert find_leaks(parts, threshold=0.6) == []


def published(name: str, language: str, task: str = "qa") -> list[Example]:
    return load_examples(DATA / f"{name}.jsonl", TASKS[task], language)[0]


@needs_data
@pytest.mark.parametrize("language", ["en", "ar", "es", "zh"])
def test_squad_rows_beside_xquad_leak_into_no_language(language: str) -> None:
    xquad = published(f"qa/{language}", language)
    squad = published("qa/en_squad", "en")
    assert find_leaks({"source/train": squad, "target/test": xquad}, threshold=0.5) == []
    kept, dropped = drop_parallel(squad, xquad)
    assert (len(kept), dropped) == (len(squad), 0)


@needs_data
def test_every_row_of_parallel_files_leaks_by_its_id() -> None:
    english, arabic = published("qa/en", "en"), published("qa/ar", "ar")
    leaks = find_leaks({"source/train": english, "target/test": arabic})
    assert Counter(kinds(leaks)) == {"id": 826}
    kept, dropped = drop_parallel(english, arabic[:1])
    assert dropped == sum(example.group == english[0].group for example in english) > 1
    assert find_leaks({"source/train": kept, "target/test": arabic[:1]}) == []


@needs_data
@pytest.mark.parametrize("language", ["sw", "am"])
def test_news_written_in_a_language_and_news_translated_into_it_share_nothing(language) -> None:
    parts = {
        "target/train": published(
            f"summarization/{language}_masakhanews", language, "summarization"
        ),
        "target/test": published(f"summarization/{language}", language, "summarization"),
    }
    assert find_leaks(parts, threshold=0.5) == []


@needs_data
def test_passages_told_twice_are_found_in_published_questions() -> None:
    # Three pairs of ARCD's passages differ in a few words; each alone is its own group.
    contexts = {example.group: example for example in published("qa/ar_arcd", "ar")}
    alone = {group: [replace(example, id=group)] for group, example in contexts.items()}
    leaks = find_leaks(alone)
    assert kinds(leaks) == ["near"] * 3
    assert all(0.8 <= leak.similarity < 0.9 for leak in leaks)


def test_rows_that_share_a_long_instruction_are_no_near_duplicates() -> None:
    shared = " ".join(f"rule{n}" for n in range(60))
    rows = [Example(str(n), f"g{n}", "en", {"prompt": f"{shared} {n}"}, ("x",)) for n in range(4)]
    assert not find_leaks({"train": rows[:2], "test": rows[2:]}, threshold=0.5)
    same = Example("9", "g9", "en", rows[0].fields, ("x",))
    assert [leak.kind for leak in find_leaks({"train": rows[:2], "test": [same]})] == ["text"]


def test_a_region_does_not_make_another_language() -> None:
    text = " ".join(f"word{n}" for n in range(40))
    one = Example("1", "a", "en", {"article": text}, ("x",))
    other = Example("2", "b", "en-GB", {"article": f"{text} more"}, ("x",))
    assert [leak.kind for leak in find_leaks({"train": [one], "test": [other]})] == ["near"]


def random_parts(seed: int) -> dict[str, list[Example]]:
    """Return three splits with groups of equal and similar texts, and a few shared ids."""
    draw = random.Random(seed)
    bases = [[draw.randrange(300) for _ in range(30)] for _ in range(6)]
    rows: list[Example] = []
    for number in range(40):
        numbers = list(draw.choice(bases))
        for _ in range(draw.choice([0, 0, 1, 2, 4])):
            numbers[draw.randrange(30)] = draw.randrange(300)
        text = words(*numbers)
        shares_id = number in (20, 30) and seed % 2
        name = f"r{number - 20}" if shares_id else f"r{number}"
        rows.append(row(name, text, group=draw.choice([text_key(text), f"g{number}"])))
    return {"train": rows[:20], "dev": rows[20:30], "test": rows[30:]}


def alike(one: Example, two: Example, threshold: float) -> bool:
    sets = [set(zip(t, t[1:], t[2:], strict=False)) for t in
            (one.fields["context"].split(), two.fields["context"].split())]  # fmt: skip
    same = one.id == two.id or one.group == two.group
    return same or len(sets[0] & sets[1]) / len(sets[0] | sets[1]) >= threshold


@pytest.mark.parametrize("seed", range(30))
def test_every_group_that_leaks_into_a_split_is_in_a_pair_with_it(seed: int) -> None:
    parts = random_parts(seed)
    leaks = find_leaks(parts, threshold=0.7)
    rows = {(split, e.id): e for split in parts for e in reversed(parts[split])}
    told = {
        (split, rows[split, one].group, other)
        for leak in leaks
        for (split, one), other in ((leak.first, leak.second[0]), (leak.second, leak.first[0]))
    }
    wanted = {
        (split, e.group, other)
        for split, other in [(a, b) for a in parts for b in parts if a != b]
        for e in parts[split]
        if any(alike(e, two, 0.7) for two in parts[other])
    }
    assert told == wanted != set()
    assert all(alike(rows[leak.first], rows[leak.second], 0.7) for leak in leaks)


@pytest.mark.parametrize("seed", range(30))
def test_splits_without_repeats_need_no_second_search(seed: int) -> None:
    kept, _ = drop_repeated_texts(random_parts(seed), threshold=0.7)
    other = {f"other/{split}": rows for split, rows in random_parts(seed).items()}
    for parts in (kept, {**kept, **other}):
        leaks = find_leaks(parts, threshold=0.7)
        assert find_leaks(parts, threshold=0.7, apart=[tuple(kept)]) == leaks
    assert find_leaks(random_parts(seed), threshold=0.7, apart=[("train", "dev")])


def test_copies_of_one_text_give_as_many_pairs_as_groups_and_not_as_pairs() -> None:
    texts = [words(*range(60), 1000 + number) for number in range(400)]
    rows = [row(str(n), text) for n, text in enumerate(texts)]
    leaks = find_leaks({"train": rows[:200], "dev": rows[200:]})
    assert len(leaks) == 399
    same = [row(str(n), texts[0], group=f"g{n}") for n in range(400)]
    assert len(find_leaks({"train": same[:200], "dev": same[200:]})) == 399


def test_a_long_search_says_how_far_it_is(monkeypatch) -> None:
    monkeypatch.setattr("grasp_lora.data.leaks._TOLD_EVERY", -1.0)
    one, two = CHANGED["en"]
    said: list[str] = []
    find_leaks({"train": [row("1", one)], "dev": [row("2", two), row("3", "x")]}, say=said.append)
    assert said == [f"looking for near-duplicates: {n} % of 2 texts" for n in (0, 50)]
