import pytest

from grasp_lora.config.languages import language_code


@pytest.mark.parametrize(
    ("given", "code"),
    [
        ("zh", "zh"),
        ("zho", "zh"),
        ("cmn", "zh"),
        ("Chinese", "zh"),
        ("ara", "ar"),
        ("AR", "ar"),
        ("zh-TW", "zh-TW"),
        ("zho_Hant", "zh-Hant"),
        ("pt_BR", "pt-BR"),
        ("pcm", "pcm"),
        ("xx", "xx"),
        ("bod", "bo"),
        ("dzo_BT", "dz-BT"),
        ("Cantonese", "yue"),
        ("und", "und"),
    ],
)
def test_codes_and_names_become_the_code_that_rules_go_by(given: str, code: str) -> None:
    assert language_code(given) == code


@pytest.mark.parametrize("given", ["", "a", "klingon", "中文", "en,ar", "e1"])
def test_what_is_no_code_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="is no language code; give two or three letters"):
        language_code(given)
