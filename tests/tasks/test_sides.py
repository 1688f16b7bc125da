"""The tokens around the two sides of an encoder-decoder, against what its tokenizer writes."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from architectures import mbart50_tokenizer, mbart_tokenizer, nllb_tokenizer, t5_tokenizer
from grasp_lora.tasks.base import TASKS
from grasp_lora.tasks.sides import Sides, language_of, two_sides
from helpers import BOS_ID, EOS_ID, tiny_tokenizer


class OfM2M100:
    """What M2M100's tokenizer tells of its languages, which it names by their codes alone."""

    lang_code_to_id = {"ar": 7, "es": 8, "zh": 9}


@pytest.mark.parametrize(
    ("language", "nllb", "mbart"),
    [
        ("es", "spa_Latn", "es_XX"),
        ("ar", "arb_Arab", "ar_AR"),
        ("sw", "swh_Latn", "sw_KE"),
        ("zh", "zho_Hans", "zh_CN"),
        ("zh-TW", "zho_Hant", "zh_CN"),
        ("zh-Hant", "zho_Hant", "zh_CN"),
        ("pt-BR", "por_Latn", "pt_XX"),
        ("spa_Latn", "spa_Latn", None),
    ],
)
def test_a_language_has_the_name_that_the_tokenizer_gives_it(language, nllb, mbart):
    assert language_of(nllb_tokenizer(), language) == nllb
    if mbart is not None:
        assert language_of(mbart50_tokenizer(), language) == mbart


def test_codes_alone_are_names_too():
    assert language_of(OfM2M100(), "es") == "es"
    assert language_of(OfM2M100(), "zh-TW") == "zh"


def test_every_language_with_a_prompt_is_one_of_nllb_once():
    tokenizer = nllb_tokenizer()
    languages = {code for task in TASKS.values() for code in task.prompts}
    named = {code: language_of(tokenizer, code) for code in languages}
    assert len(set(named.values())) == len(languages) > 20
    assert named["am"] == "amh_Ethi"
    assert named["ur"] == "urd_Arab"


def test_a_language_that_a_tokenizer_does_not_know_is_one_error():
    with pytest.raises(ValueError, match="knows no language 'yo'; it knows ar_AR, cs_CZ") as caught:
        language_of(mbart_tokenizer(), "yo")
    assert len(str(caught.value)) < 260


def test_the_decoder_begins_as_the_shift_of_each_model_lets_it():
    t5, mbart, mbart50, nllb = (
        make() for make in (t5_tokenizer, mbart_tokenizer, mbart50_tokenizer, nllb_tokenizer)
    )
    assert two_sides(t5, 0, "es") == Sides((), (1,), (0,))
    spanish = mbart.convert_tokens_to_ids("es_XX")
    assert two_sides(mbart, 2, "es") == Sides((), (2, spanish), (spanish,))
    spanish = mbart50.convert_tokens_to_ids("es_XX")
    assert two_sides(mbart50, 2, "es") == Sides((spanish,), (2,), (2, spanish))
    spanish = nllb.convert_tokens_to_ids("spa_Latn")
    assert two_sides(nllb, 2, "es") == Sides((spanish,), (2,), (2, spanish))


def test_a_saved_tokenizer_is_set_to_the_language_of_the_rows(tmp_path):
    tokenizer = nllb_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert two_sides(loaded, 2, "es") == two_sides(tokenizer, 2, "es")
    assert two_sides(loaded, 2, "en") != two_sides(loaded, 2, "es")


def test_the_start_of_a_text_is_ahead_of_the_answer_where_the_tokenizer_puts_one():
    bart = tiny_tokenizer()
    bart.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", BOS_ID), ("<eos>", EOS_ID)]
    )
    assert two_sides(bart, EOS_ID, "xx") == Sides((BOS_ID,), (EOS_ID,), (EOS_ID, BOS_ID))


def test_a_tokenizer_that_adds_nothing_leaves_the_start_alone():
    assert two_sides(tiny_tokenizer(), 256, "xx") == Sides((), (), (256,))
