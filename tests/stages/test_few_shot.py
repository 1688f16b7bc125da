"""Evaluation of the bare backbone with solved examples in its prompt."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoTokenizer

from grasp_lora.base.files import read_json, read_jsonl
from grasp_lora.config.run_config import RunConfig, make_config
from grasp_lora.plans.executor import work_off
from grasp_lora.plans.plan import Plan
from grasp_lora.plans.session import Session
from grasp_lora.plans.show import sizes_of
from grasp_lora.stages.evaluate import EVALUATE
from grasp_lora.stages.few_shot import FewShot
from grasp_lora.stages.keys import differences, key_of
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Stage
from grasp_lora.tasks.chat import few_shot_frames
from grasp_lora.tasks.encoding import EncodedExample
from grasp_lora.workbench.context import Context, open_context
from grasp_lora.workbench.rows import RunData, load_run_data
from helpers import (
    ARCHITECTURES,
    packaged_tokenizer,
    tiny_backbone_folder,
    tiny_bloom_model,
    tiny_tokenizer,
)
from jobs import job, write_rows

PLACES = {"train": range(12), "micro_dev": range(20, 22), "dev": range(30, 33)}
TESTED = range(40, 45)


def configured(folder: Path, **changes: Any) -> RunConfig:
    """Return settings of an evaluation; a row alone takes about 70 of 512 positions."""
    files = {
        split: str(write_rows(folder / f"{split}.jsonl", numbers))
        for split, numbers in (PLACES | {"test": TESTED}).items()
    }
    data = {"target": {"language": "en", "prompt": "{context} {question}", "files": files}}
    chat = changes.pop("chat", False)
    values = job(folder, evaluate={"max_new_tokens": 3, "batch_size": 3}, **changes)
    values |= {"data": data | {"max_length": 200, "chat": chat}}
    return make_config(values, training=False)


def opened(config: RunConfig, quiet: bool = True) -> Context:
    return open_context(config, quiet=quiet, training=False)


def stage_of(config: RunConfig, shots: int | None, labelled: bool = True) -> Stage:
    return Stage("out", "evaluate", config, options={"shots": shots, "labelled": labelled})


def evaluated(config: RunConfig, folder: Path, shots: int | None, context: Context | None = None):
    """Return scores, losses and predictions of an evaluation."""
    context = context or opened(config)
    session = Session(config, context.data, context)
    work_off(Plan({"out": stage_of(config, shots)}), folder, session)
    out = folder / "out"
    predictions = read_jsonl(out / "predictions.jsonl")
    return read_json(out / "scores.json"), read_json(out / "losses.json"), predictions


def text_of(number: int) -> str:
    return f"q house number {number} has {number + 2} rooms. How many rooms has q house {number}?"


def answer_of(number: int) -> str:
    return f" {number + 2} rooms"


def by_hand(model: Any, tokenizer: Any, ids: list[str], number: int, end: str = "\n") -> float:
    """Return the loss of an answer behind a prompt that is written and read as a whole."""
    solved = [text_of(int(one[1:])) + answer_of(int(one[1:])) + "\n\n" for one in ids]
    prompt = tokenizer("".join(solved) + text_of(number))["input_ids"]
    answer = tokenizer(answer_of(number) + end)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return float(functional.cross_entropy(logits, torch.tensor(answer)))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_losses_are_those_of_the_prompt_written_by_hand(arch, tmp_path):
    tiny_backbone_folder(tmp_path / "base", arch)
    config = configured(tmp_path)
    context = opened(config)
    scores, losses, predictions = evaluated(config, tmp_path, 4, context)
    ids, model, tokenizer = scores["shots"]["ids"], context.backbone.model, tiny_tokenizer()
    assert len(set(ids)) == 4
    assert set(ids) <= {f"q{n}" for n in PLACES["train"]}
    for split in ("micro_dev", "dev"):
        wanted = [by_hand(model, tokenizer, ids, number) for number in PLACES[split]]
        assert losses[split] == pytest.approx(wanted, abs=1e-5)
    wanted = [by_hand(model, tokenizer, ids, number) for number in TESTED]
    assert [row["loss"] for row in predictions] == pytest.approx(wanted, abs=1e-5)
    plain = evaluated(config, tmp_path / "plain", None, context)
    tokens = [[row["tokens"] for row in rows] for rows in (predictions, plain[2])]
    assert tokens[0] == tokens[1], "the losses are means over as many tokens"


def test_the_solved_examples_are_read_once(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    config = configured(tmp_path)
    context, read = opened(config), []
    context.backbone.model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, inputs: read.append(inputs[0].shape)
    )
    scores, _, _ = evaluated(config, tmp_path, 4, context)
    ahead = scores["shots"]["tokens"]
    assert ahead > 4 * 70
    assert [shape[1] for shape in read if shape[1] >= ahead] == [ahead]
    cost = EVALUATE.cost(stage_of(config, 4), sizes_of(config, context.data))
    plain = EVALUATE.cost(stage_of(config, None), sizes_of(config, context.data))
    lengths = {row.id: len(row.input_ids) for row in context.encoded("target", "train")}
    assert cost.tokens - plain.tokens == round(4 * sum(lengths.values()) / len(lengths))
    # A row alone has an end token; in the prompt all but the first have "\n\n" ahead instead.
    assert ahead == sum(lengths[one] for one in scores["shots"]["ids"]) - 4 + 3 * 2
    assert (cost.forwards, cost.answers, cost.steps) == (plain.forwards, plain.answers, 0)


def test_a_model_whose_cache_cannot_be_shared_reads_whole_prompts(tmp_path):
    tiny_bloom_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    config = configured(tmp_path)
    context = opened(config)
    scores, losses, _ = evaluated(config, tmp_path, 4, context)
    ids, model = scores["shots"]["ids"], context.backbone.model
    wanted = [by_hand(model, tiny_tokenizer(), ids, number) for number in PLACES["dev"]]
    assert losses["dev"] == pytest.approx(wanted, abs=1e-5)


def test_answers_are_those_of_whole_prompts_and_beams_give_some_too(tmp_path, monkeypatch):
    tiny_backbone_folder(tmp_path / "base", "gemma3_text")
    config = configured(tmp_path)
    shared = evaluated(config, tmp_path, 4)
    monkeypatch.setattr("grasp_lora.stages.few_shot.can_read_prefix", lambda _model: False)
    whole = evaluated(config, tmp_path / "whole", 4)
    assert shared[1] == {k: pytest.approx(v, abs=1e-5) for k, v in whole[1].items()}
    texts = [[row["prediction"] for row in one[2]] for one in (shared, whole)]
    assert texts[0] == texts[1]
    evaluation = config.evaluate.model_copy(update={"beams": 2})
    beams = config.model_copy(update={"evaluate": evaluation})
    assert len(evaluated(beams, tmp_path / "beams", 4)[2]) == len(TESTED)


def test_the_first_four_of_eight_are_the_four_and_the_seed_draws_them(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    drawn = {}
    for seed in (1, 2):
        config = configured(tmp_path, seed=seed)
        context = opened(config)
        for shots in (2, 4):
            scores, _, _ = evaluated(config, tmp_path / f"{seed}-{shots}", shots, context)
            drawn[seed, shots] = scores["shots"]["ids"]
        assert drawn[seed, 4][:2] == drawn[seed, 2]
    assert drawn[1, 4] != drawn[2, 4]


def test_as_many_are_taken_as_fit_and_that_is_said(tmp_path, capsys):
    tiny_backbone_folder(tmp_path / "base")
    config = configured(tmp_path)
    scores, losses, _ = evaluated(config, tmp_path, 8, opened(config, quiet=False))
    shots, said = scores["shots"], " ".join(capsys.readouterr().err.split())
    used = shots["used"]
    assert (shots["wanted"], len(shots["ids"])) == (8, used)
    assert f"{used} solved examples, not 8: more do not fit the model's 512 positions" in said
    longest = max(len(text_of(n) + answer_of(n)) for n in TESTED)
    assert shots["tokens"] + longest + 3 <= 512 < shots["tokens"] * (used + 1) / used + longest + 3
    assert len(losses["dev"]) == 3


def test_few_train_rows_are_all_taken(tmp_path, capsys):
    tiny_backbone_folder(tmp_path / "base")
    config = configured(tmp_path)
    write_rows(tmp_path / "train.jsonl", range(3))
    scores, _, _ = evaluated(config, tmp_path, 4, opened(config, quiet=False))
    assert scores["shots"]["used"] == 3
    assert "3 solved examples, not 4: there are 3 train rows" in capsys.readouterr().err


def test_where_not_one_fits_the_reason_is_told(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    config = configured(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows = [row | {"context": row["context"] + " So it is." * 60} for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    long = config.model_copy(update={"data": config.data.model_copy(update={"max_length": 500})})
    with pytest.raises(NotApplicable, match="not even one solved example .* 512 positions"):
        evaluated(long, tmp_path, 4)


def test_without_train_rows_there_are_none(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    config = configured(tmp_path)
    context = opened(config).on_target({})
    with pytest.raises(NotApplicable, match="no target train rows"):
        evaluated(config, tmp_path, 4, context)


CHATML = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"


@pytest.mark.parametrize(("template", "fits"), [(CHATML, True), (CHATML + "{{ 1/0 }}", False)])
def test_in_a_chat_they_are_earlier_turns(template, fits, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_backbone_folder(tmp_path / "base"))
    once = "{% if messages|length > 2 %}{{ raise_exception('one turn') }}{% endif %}"
    tokenizer.chat_template = template if fits else once + CHATML
    tokenizer.save_pretrained(tmp_path / "base")
    config = configured(tmp_path, chat=True)
    if not fits:
        with pytest.raises(NotApplicable, match="one turn"):
            evaluated(config, tmp_path, 2)
        return
    context = opened(config)
    scores, losses, _ = evaluated(config, tmp_path, 2, context)
    numbers = [int(one[1:]) for one in scores["shots"]["ids"]]
    for number, found in zip(PLACES["dev"], losses["dev"], strict=True):
        turns: list[dict[str, str]] = []
        for one in (*numbers, number):
            turns.append({"role": "user", "content": text_of(one)})
            turns.append({"role": "assistant", "content": answer_of(one).strip()})
        whole = tokenizer.apply_chat_template(turns, tokenize=False)
        begin = whole.rindex("assistant\n") + len("assistant\n")
        prompt = tokenizer(whole[:begin])["input_ids"]
        answer = tokenizer(whole[begin:].rstrip())["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            ids = torch.tensor([prompt + answer])
            logits = context.backbone.model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        wanted = float(functional.cross_entropy(logits, torch.tensor(answer)))
        assert found == pytest.approx(wanted, abs=1e-5)


def test_what_a_model_writes_behind_its_answer_is_cut(tmp_path, monkeypatch):
    tiny_backbone_folder(tmp_path / "base")
    config = configured(tmp_path)
    values: dict[str, Any] = config.to_dict() | {"output": str(tmp_path / "run")}
    values["data"]["task"] = "text-to-text"
    values["data"]["target"]["prompt"] = "Text: {context} {question}"
    values["data"]["target"]["columns"] = {"completion": "answers"}
    written = ["one\ntwo\n\nText: q house", "\n\nText: q house", "one\nText: two", "one", "a\n \nb"]
    asked: list[Any] = []

    def writes(_model, _tokenizer, rows, settings, **_calls):
        asked.append(settings)
        return [(text, 0.5) for text, _ in zip(written, rows, strict=True)]

    monkeypatch.setattr("grasp_lora.stages.evaluate.answer_examples", writes)
    kept = evaluated(make_config(values, training=False), tmp_path, 4)[2]
    assert [row["prediction"] for row in kept] == ["one\ntwo", "", "one", "one", "a"]
    assert [asked[0].ended(text) for text in ("one\ntwo", "one\n\n", "a\nText:")] == [
        *(False, True, True)
    ]
    whole = evaluated(make_config(values, training=False), tmp_path / "plain", None)[2]
    assert [row["prediction"] for row in whole] == [text.strip() for text in written]
    assert asked[1].ended is None


def test_a_blank_line_that_is_one_token_ends_an_answer_as_an_end_token_does(tmp_path):
    (tmp_path / "base").mkdir()
    tokenizer = packaged_tokenizer("smollm2")
    context: Any = SimpleNamespace(
        config=configured(tmp_path), backbone=SimpleNamespace(tokenizer=tokenizer)
    )
    shots = FewShot(context, 4, (), few_shot_frames(tokenizer, chat=False))
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("\u010a", "\u010a\u010a")]
    rows = [EncodedExample("q", "g", (1, 2, end), 1, 0) for end in ends]
    assert shots.stop_ids(rows) == {ends[1]}


def test_only_solved_examples_make_the_result_depend_on_train_rows(tmp_path):
    (tmp_path / "base").mkdir()
    config = configured(tmp_path)
    data = load_run_data(config, lambda _line: None, training=False)

    def keyed(shots, rows):
        return key_of(stage_of(config, shots), EVALUATE, rows, "base", {})

    assert keyed(None, data)["options"] == {"labelled": True}
    assert "target/train" not in keyed(None, data)["examples"]
    assert differences(keyed(4, data), keyed(8, data)) == ["shots was 4, is 8"]
    other_train = dict(data.parts["target"]) | {"train": data.parts["target"]["train"][1:]}
    fewer = RunData({"target": other_train})
    assert differences(keyed(4, data), keyed(4, fewer)) == [
        "the examples of target/train have changed"
    ]
    assert differences(keyed(None, data), keyed(None, fewer)) == []


@pytest.mark.parametrize("shots", [None, 4])
def test_measuring_alone_reads_the_same_losses_and_no_test_example(shots, tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    config = configured(tmp_path)
    context = opened(config)
    _, wanted, _ = evaluated(config, tmp_path / "answered", shots, context)
    options = {"shots": shots, "labelled": True, "unanswered": True}
    stage = Stage("out", "evaluate", config, options=options)
    out, session = tmp_path / "alone" / "out", Session(config, context.data, context)
    work_off(Plan({"out": stage}), out.parent, session)
    assert read_json(out / "losses.json") == wanted
    assert sorted(one.name for one in out.iterdir()) == ["losses.json", "stage.json"]
    key = read_json(out / "stage.json")["key"]
    assert not [name for name in key["settings"] if name.startswith(("evaluate.m", "evaluate.r"))]
    if shots is None:
        assert not [name for name in key["examples"] if name.endswith("test")]
    sizes = sizes_of(config, context.data)
    both = EVALUATE.cost(stage_of(config, shots), sizes)
    alone = EVALUATE.cost(stage, sizes)
    assert (alone.answers, both.answers) == (0, len(TESTED))
    assert alone.forwards == both.forwards == sum(len(PLACES[s]) for s in ("dev", "micro_dev"))


def test_the_prompt_that_is_shipped_is_the_one_that_was_scored(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    config = configured(tmp_path)
    # The longest of all questions is a test question, so that it decides how many examples fit.
    file = tmp_path / "test.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["context"] += " It is yellow." * 8
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    context = opened(config)
    scores, _, _ = evaluated(config, tmp_path, 6, context)
    session = Session(config, context.data, context)
    stage = Stage("final", "prompt", config, options={"shots": 6})
    work_off(Plan({"final": stage}), tmp_path, session)
    shipped = read_json(tmp_path / "final" / "prompt.json")
    assert 0 < len(scores["shots"]["ids"]) < 6
    assert shipped["ids"] == scores["shots"]["ids"]
