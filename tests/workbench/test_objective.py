"""Rewards other than the loss: what a row costs, and what is refused before any work."""

import dataclasses
import sys
import types
from unicodedata import normalize

import pytest
from sacrebleu.metrics import CHRF
from typer.testing import CliRunner

from grasp_lora.base.files import read_json, read_jsonl
from grasp_lora.cli import app
from grasp_lora.config.run_config import load_config
from grasp_lora.workbench import objective as rewards
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.objective import objective_faults, objective_of
from helpers import tiny_backbone_folder
from jobs import job, write_job

SPLITS = ("micro_dev", "dev")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    tiny_backbone_folder(folder / "base")
    return folder


@pytest.fixture
def mine(monkeypatch):
    """A module of the user's with rewards of several kinds."""
    module = types.ModuleType("my_rewards")
    module.lengths = lambda texts, references: [len(text) for text in texts]
    module.short = lambda texts, references: [1.0]
    module.equal = lambda texts, references: [
        float(text in given) for text, given in zip(texts, references, strict=True)
    ]
    module.undefined = lambda texts, references: [float("nan")] * len(texts)
    module.number = 3
    monkeypatch.setitem(sys.modules, "my_rewards", module)


def opened(folder, reward):
    controller = {"rounds": 3, "rows": 4, "reward": reward}
    file = write_job(folder / "run.yaml", job(folder, controller=controller))
    return open_context(load_config(file), quiet=True)


def answered(monkeypatch, texts):
    """Let the model answer with these texts; return the prompts it is given."""
    asked = []

    def generate(model, tokenizer, prompts, *settings, **calls):
        asked.extend(tokenizer.decode(prompt) for prompt in prompts)
        return list(texts)

    monkeypatch.setattr(rewards, "generate_texts", generate)
    return asked


def test_the_loss_needs_no_answers(folder):
    assert objective_of(opened(folder, "loss"), SPLITS) is None


def test_a_row_costs_its_own_score_with_the_sign_changed(folder, monkeypatch):
    context = opened(folder, "chrf")
    examples = [*context.examples("target", "micro_dev"), *context.examples("target", "dev")]
    drawn = [1, 5]
    texts = [examples[1].references[0], "something else"]
    asked = answered(monkeypatch, texts)
    cost = objective_of(context, SPLITS)(context.backbone.model, drawn)
    for prompt, i in zip(asked, drawn, strict=True):
        assert examples[i].fields["question"] in prompt
        assert not prompt.endswith(examples[i].references[0])
    expected = [
        -CHRF().sentence_score(text, list(examples[i].references)).score / 100
        for text, i in zip(texts, drawn, strict=True)
    ]
    assert cost == pytest.approx(expected, abs=1e-6)
    assert cost[0] == pytest.approx(-1)


def test_what_stands_behind_a_turns_end_is_not_judged(folder, monkeypatch):
    context = opened(folder, "chrf")
    for split in SPLITS:
        context.encoded("target", split)
    context.encoding_reports = {
        where: dataclasses.replace(report, end_text="</turn>")
        for where, report in context.encoding_reports.items()
    }
    (dev, *_), micro_dev = (
        context.examples("target", "dev"),
        context.examples("target", "micro_dev"),
    )
    answered(monkeypatch, [f"{e.references[0]}</turn>" for e in (micro_dev[1], dev)])
    drawn = [1, len(micro_dev)]
    assert objective_of(context, SPLITS)(context.backbone.model, drawn) == pytest.approx([-1, -1])


def test_a_function_of_ones_own_is_asked(folder, mine, monkeypatch):
    context = opened(folder, "my_rewards:lengths")
    answered(monkeypatch, ["abc", "abcdef"])
    assert objective_of(context, SPLITS)(context.backbone.model, [0, 1]) == [-3, -6]


@pytest.mark.parametrize("reward", ["exact_match", "my_rewards:equal"])
def test_an_answer_in_another_form_earns_as_much(folder, mine, monkeypatch, reward):
    context = opened(folder, reward)
    examples = context.examples("target", "micro_dev")
    context.data.parts["target"] = {
        **context.data.parts["target"],
        "micro_dev": [
            dataclasses.replace(examples[0], references=("thành phố Huế",)),
            dataclasses.replace(examples[1], references=("القـاهرة",)),
            *examples[2:],
        ],
    }
    answered(monkeypatch, [normalize("NFD", "thành phố Huế"), "\u200fﺍﻟﻘﺎﻫﺮﺓ"])
    cost = objective_of(context, SPLITS)(context.backbone.model, [0, 1])
    assert cost == pytest.approx([-1, -1])


def test_scores_that_are_no_numbers_lose_and_too_few_are_refused(folder, mine, monkeypatch):
    answered(monkeypatch, ["a", "b"])
    context = opened(folder, "my_rewards:undefined")
    costs = objective_of(context, SPLITS)(context.backbone.model, [0, 1])
    assert all(one != one for one in costs)
    context = opened(folder, "my_rewards:short")
    with pytest.raises(ValueError, match="gave 1 scores for 2 answers"):
        objective_of(context, SPLITS)(context.backbone.model, [0, 1])


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ("chrff", "did you mean 'chrf'?"),
        ("bleu", "neither the loss nor a score of single rows"),
        ("perplexity", "neither the loss nor a score of single rows"),
        ("no_such_module:f", "cannot be loaded"),
        ("my_rewards:missing", "cannot be loaded"),
        ("my_rewards:number", "is no function"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_before_any_work(folder, mine, reward, said):
    controller = {"rounds": 3, "rows": 4, "reward": reward}
    file = write_job(folder / "bad.yaml", job(folder, controller=controller))
    assert said in objective_faults(load_config(file))[0]
    for arguments in (
        ("run", str(file)),
        ("search", str(file), "--merged", "nowhere", "--out", str(folder / "out")),
    ):
        done = CliRunner().invoke(app, list(arguments))
        assert done.exit_code == 2
        assert said in done.output.replace("\n", " ")


@pytest.mark.parametrize("reward", ["loss", "exact_match", "token_f1", "chrf", "rougeL"])
def test_rewards_that_can_be_are_not_refused(folder, reward):
    controller = {"rounds": 3, "rows": 4, "reward": reward}
    file = write_job(folder / "good.yaml", job(folder, controller=controller))
    assert objective_faults(load_config(file)) == []


def test_a_search_by_answers_that_are_all_wrong_is_flat_and_called_coarse(folder):
    controller = {"rounds": 3, "rows": 4, "reward": "exact_match"}
    file = write_job(
        folder / "coarse.yaml", job(folder, controller=controller, output=str(folder / "coarse"))
    )
    done = CliRunner().invoke(app, ["run", str(file)])
    assert done.exit_code == 0, done.output
    ratio = read_json(folder / "coarse" / "ratio.json")
    assert ratio["verdict"] == "flat"
    assert ratio["reward"] == "exact_match"
    assert "coarse-reward" in [one["name"] for one in ratio["findings"]]
    assert "coarse-reward: 9 of 9 pairs" in done.output.replace("\n", " ")
    report = (folder / "coarse" / "report.md").read_text(encoding="utf-8")
    assert "- coarse-reward: 9 of 9 pairs" in report
    for record in read_jsonl(folder / "coarse" / "rounds.jsonl"):
        assert set(record["losses"]) == {0.0}
