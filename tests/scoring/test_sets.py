import pytest

from grasp_lora.config.run_config import RunConfig
from grasp_lora.metrics import Row
from grasp_lora.scoring.sets import empty_answers, score_sets


def test_answers_that_show_nothing_are_empty():
    said = ["", " \n", "\u200f\ufeff", "ـ", ".", "0"]
    assert empty_answers([Row(str(n), text, ("a",)) for n, text in enumerate(said)]) == 4


@pytest.mark.parametrize(
    ("rules", "used", "f1"),
    [
        # 3 common, 6 found, 3 wanted: 6/9; 2 common, 3 found, 2 wanted: 4/5
        ({}, {"test": "unicode", "arcd": "squad"}, {"test": 200 / 3, "arcd": 80}),
        ({"metric_rules": "squad"}, {"test": "squad", "arcd": "squad"}, {"test": 0, "arcd": 80}),
        # English articles stay: the same 4/5
        ({"metric_rules": "unicode"}, {"test": "unicode", "arcd": "unicode"}, None),
    ],
)
def test_each_set_has_the_rules_of_its_language_and_records_them(rules, used, f1):
    tests = {"arcd": {"language": "ar", "files": "arcd.jsonl"}}
    config = RunConfig.model_validate(
        {
            "model": "none",
            "data": {"target": {"language": "zh"}, "tests": tests},
            "evaluate": {"metrics": ["token_f1"]} | rules,
        }
    )
    sets = {"test": ("target", "test"), "arcd": ("tests", "arcd")}
    predictions = {
        "test": [Row("1", "北京市海淀区", ("海淀区",))],
        "arcd": [Row("1", "في مدينة القـاهرة", ("مدينة القاهرة",))],
    }
    scored, _ = score_sets(config, sets, predictions, "tokenizer", "cpu")
    found = {name: one["scores"]["token_f1"] for name, one in scored["sets"].items()}
    assert {name: one["settings"]["rules"] for name, one in found.items()} == used
    wanted = f1 or {"test": 200 / 3, "arcd": 80}
    assert {name: one["value"] for name, one in found.items()} == pytest.approx(wanted)
    assert all("presentation forms" in one["settings"]["texts"] for one in found.values())
