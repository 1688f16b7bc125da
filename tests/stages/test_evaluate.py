"""Evaluation of any adapter on several test sets, and what it writes."""

import json
import logging
import math
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, PrefixTuningConfig, get_peft_model
from tokenizers import AddedToken
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from grasp_lora.base.files import read_json, read_jsonl, write_json
from grasp_lora.cli import app
from grasp_lora.config.run_config import ConfigError, make_config
from grasp_lora.metrics import exact_match
from grasp_lora.plans.run import run
from grasp_lora.plans.single import evaluate_adapter
from grasp_lora.scoring.cells import evaluation_tables
from grasp_lora.stages.evaluate import chosen_adapter
from helpers import EOS_ID, tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import job, write_rows


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_backbone_folder(tmp_path / "base")
    tiny_adapter_folder(tmp_path / "lora", tiny_model("llama"), r=4)
    write_rows(tmp_path / "one.jsonl", range(6))
    write_rows(tmp_path / "two.jsonl", range(4), prefix="n")
    return tmp_path


def evaluated(place: Path, adapter: str, *options: str) -> dict[str, Any]:
    """Return the scores of an adapter or a model below `place`, or of `none`."""
    done = evaluation(place, adapter, *options)
    assert done.exit_code == 0, done.output
    return read_json(out_of(place, adapter) / "scores.json")


def out_of(place: Path, adapter: str) -> Path:
    return place / f"scores-{adapter}"


def evaluation(place: Path, adapter: str, *options: str) -> Any:
    given = adapter if adapter == "none" else str(place / adapter)
    arguments = ["evaluate", given, "--out", str(out_of(place, adapter))]
    arguments += ["--model", str(place / "base")]
    settings = ["model.dtype=float32", "data.max_length=640", "evaluate.max_new_tokens=3"]
    arguments += [f"--set={text}" for text in settings] + list(options)
    return CliRunner().invoke(app, arguments)


class Heard(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.mark.parametrize("adapter", ["base", "lora", "prefix"])
def test_an_evaluation_warns_of_nothing(place, adapter):
    if adapter == "prefix":
        chosen = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        get_peft_model(tiny_model("llama"), chosen).save_pretrained(str(place / "prefix"))
    libraries, heard = logging.getLogger("transformers"), Heard()
    transformers_logging.warning_once.cache_clear()  # type: ignore[attr-defined]
    libraries.addHandler(heard)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rows = [f"--data={place / 'one.jsonl'}", "--language=en"]
            scores = evaluated(place, adapter, *rows)
    finally:
        libraries.removeHandler(heard)
    assert scores["sets"]["test"]["n"] == 6
    assert heard.lines == []


def test_several_test_sets_have_their_scores_the_mean_and_the_worst(place):
    rows = [f"--data={place / 'one.jsonl'}", f"--data=news={place / 'two.jsonl'}"]
    scores = evaluated(place, "lora", *rows, "--language=en")
    assert [(name, one["n"]) for name, one in scores["sets"].items()] == [("test", 6), ("news", 4)]
    loss = [one["scores"]["loss"]["value"] for one in scores["sets"].values()]
    assert scores["mean"]["loss"] == pytest.approx(sum(loss) / 2)
    assert scores["worst"]["loss"]["value"] == max(loss), "the higher loss is the worse"
    assert scores["worst"]["chrf"]["value"] == min(
        one["scores"]["chrf"]["value"] for one in scores["sets"].values()
    )
    for metric in ("exact_match", "token_f1", "bleu", "chrf", "rougeLsum", "perplexity"):
        score = scores["sets"]["test"]["scores"][metric]
        assert score["low"] <= score["value"] <= score["high"]
        assert score["n"] == 6
        assert score["settings"]


def test_predictions_hold_what_every_score_is_made_of(place):
    scores = evaluated(place, "lora", f"--data={place / 'one.jsonl'}", "--language=en")
    rows = read_jsonl(place / "scores-lora/predictions.jsonl")
    assert [row["id"] for row in rows] == [f"q{n}" for n in range(6)]
    given = read_jsonl(place / "one.jsonl")
    assert [row["question"] for row in rows] == [row["question"] for row in given]
    for row in rows:
        assert row["exact_match"] == 100 * exact_match(row["prediction"], row["references"])
    told = scores["sets"]["test"]["scores"]
    assert told["loss"]["value"] == pytest.approx(np.mean([row["loss"] for row in rows]))
    nats = sum(row["loss"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    assert told["perplexity"]["value"] == pytest.approx(np.exp(nats))


def test_an_adapter_that_is_no_lora_and_a_bare_model_can_be_evaluated(place):
    model = get_peft_model(
        tiny_model("llama"),
        IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    for name, weight in model.named_parameters():
        if "ia3" in name:
            weight.data.mul_(1.7)
    model.save_pretrained(str(place / "ia3"))
    rows = [f"--data={place / 'one.jsonl'}", "--language=en"]
    losses = {
        name: evaluated(place, name, *rows)["sets"]["test"]["scores"]["loss"]["value"]
        for name in ("ia3", "base", "lora")
    }
    assert len({round(loss, 6) for loss in losses.values()}) == 3


def test_scores_of_a_file_of_predictions_equal_those_of_the_evaluation(place):
    scores = evaluated(place, "lora", f"--data={place / 'one.jsonl'}", "--language=en")
    out = place / "rescored.json"
    file = place / "scores-lora/predictions.jsonl"
    names = "bleu,chrf,rougeL,token_f1,loss"
    done = CliRunner().invoke(
        app,
        ["score", str(file), "--language=en", f"--json={out}", f"--metrics={names}", "--seed=42"],
    )
    assert done.exit_code == 0, done.output
    told = scores["sets"]["test"]["scores"]
    for name, found in read_json(out).items():
        assert [found[key] for key in ("value", "low", "high", "n")] == pytest.approx(
            [told[name][key] for key in ("value", "low", "high", "n")]
        )


def test_an_untrained_chat_model_is_asked_in_its_template(place):
    path = place / "base/tokenizer_config.json"
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<assistant>{% endif %}"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    rows = [f"--data={place / 'one.jsonl'}", "--language=en"]
    plain = evaluated(place, "lora", *rows)["sets"]["test"]["scores"]["loss"]["value"]
    (place / "scores-lora").rename(place / "plain")
    chat = evaluated(place, "lora", *rows, "--set=data.chat=true")
    assert chat["sets"]["test"]["scores"]["loss"]["value"] != pytest.approx(plain)


def test_a_chat_model_that_answers_as_asked_scores_in_full(place, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained(place / "base")
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False, normalized=False)])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(place / "base")

    def perfect(_model, tokenizer, rows, *_settings, **_calls):
        answers = (row.input_ids[row.prompt_length :] for row in rows)
        return [(tokenizer.decode(list(ids), skip_special_tokens=True), 0.5) for ids in answers]

    monkeypatch.setattr("grasp_lora.stages.evaluate.answer_examples", perfect)
    rows = [f"--data={place / 'one.jsonl'}", "--language=en"]
    scores = evaluated(place, "base", *rows, "--set=data.chat=true")
    assert scores["sets"]["test"]["scores"]["exact_match"]["value"] == 100


def test_a_score_that_cannot_be_computed_is_named_before_any_work(place, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    values = job(place, evaluate={"metrics": ["exact_match", "bertscore_f1"]})
    values["evaluate"]["bertscore_model"] = str(place / "no-encoder")
    config = make_config(values)
    for work in (
        lambda: run(config, quiet=True),
        lambda: evaluate_adapter(config, None, place / "out"),
    ):
        with pytest.raises(ConfigError, match=r"evaluate\.metrics bertscore_f1: .*no-encoder"):
            work()
    assert not (place / "run").exists()
    assert not (place / "out").exists()


def test_an_unknown_score_is_refused_with_the_nearest(place):
    config = make_config(job(place, evaluate={"metrics": ["exact_mach"]}))
    with pytest.raises(ValueError, match=r"exact_mach.*exact_match"):
        run(config, quiet=True)


@pytest.mark.skipif(sys.platform == "win32", reason="paths differ")
def test_beam_search_is_a_setting(place):
    rows = [f"--data={place / 'one.jsonl'}", "--language=en"]
    scores = evaluated(place, "lora", *rows, "--set=evaluate.beams=3")
    assert scores["sets"]["test"]["n"] == 6


def test_only_named_test_sets_will_do(place):
    scores = evaluated(place, "lora", f"--data=news={place / 'two.jsonl'}", "--language=en")
    assert list(scores["sets"]) == ["news"]


def test_references_longer_than_an_answer_may_be_are_told_before_answering(place, capsys):
    # A token is a byte, and the space ahead of the answer is one: " 9 rooms" has 8, " 10 rooms" 9.
    write_rows(place / "rows.jsonl", range(6, 10))
    write_rows(place / "short.jsonl", range(4), prefix="n")
    values = job(place, evaluate={"max_new_tokens": 8})
    values["data"] = {
        "target": {"language": "en", "files": {"test": str(place / "rows.jsonl")}},
        "tests": {"short": {"language": "en", "files": str(place / "short.jsonl")}},
    }
    evaluate_adapter(make_config(values, training=False), None, place / "out")
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "target test: 2 of 4 references are longer than the 8 new tokens an answer may have "
        "(evaluate.max_new_tokens), the longest 9: their scores are capped; raise it"
    ) in said
    assert said.count("references are longer") == 1
    assert said.index("references are longer") < said.index("evaluate, test")

    # Only the rows that are answered count.
    values["evaluate"] = {"max_new_tokens": 8, "limit": 2}
    evaluate_adapter(make_config(values, training=False), None, place / "fewer")
    assert "references are longer" not in capsys.readouterr().err


def ending_at_once(folder: Path) -> None:
    """Save a backbone to which the end is the likeliest after any prompt, then the letter x."""
    model, tokenizer = tiny_model("llama"), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("How many rooms has q house 1?\nAnswer:", return_tensors="pt")
    with torch.no_grad():
        state = model.model(prompt["input_ids"]).last_hidden_state[0, -1]
        weight = model.get_output_embeddings().weight.zero_()
        weight[EOS_ID], weight[tokenizer.encode("x")[-1]] = 2 * state, state
    model.save_pretrained(folder)


def test_empty_answers_are_counted_and_can_be_forbidden(place):
    ending_at_once(place / "base")
    rows = [f"--data={place / 'one.jsonl'}", "--language=en"]
    assert evaluated(place, "base", *rows)["sets"]["test"]["empty"] == 6
    (table,) = evaluation_tables(place / "scores-base")
    assert str(table.title) == "test: en, 6 rows, 6 empty answers"
    shutil.rmtree(place / "scores-base")
    scores = evaluated(place, "base", *rows, "--set=evaluate.min_new_tokens=1")
    assert scores["sets"]["test"]["empty"] == 0
    (table,) = evaluation_tables(place / "scores-base")
    assert str(table.title) == "test: en, 6 rows"
    texts = {row["prediction"][:1] for row in read_jsonl(place / "scores-base/predictions.jsonl")}
    assert texts == {"x"}


def test_least_tokens_beyond_the_most_are_refused_before_any_work(place):
    values = job(place, evaluate={"max_new_tokens": 4, "min_new_tokens": 5})
    with pytest.raises(ValueError, match="min_new_tokens: 5 is more than the 4 tokens an answer"):
        run(make_config(values), quiet=True)
    assert not (place / "run").exists()


def test_files_of_others_are_left_alone(place):
    out = place / "scores-lora"
    out.mkdir()
    (out / "predictions.jsonl").write_text("precious")
    rows = ["--data", str(place / "one.jsonl"), "--language", "en", "--model", str(place / "base")]
    done = CliRunner().invoke(app, ["evaluate", str(place / "lora"), "--out", str(out), *rows])
    assert done.exit_code == 2
    assert "no result of grasp-lora" in done.output
    assert (out / "predictions.jsonl").read_text() == "precious"


def test_other_weights_under_the_same_name_are_another_result(place):
    rows = [f"--data={place / 'one.jsonl'}", "--language=en"]
    evaluated(place, "base", *rows)
    tiny_backbone_folder(place / "base", seed=5)
    again = ["evaluate", str(place / "base"), "--out", str(place / "scores-base"), *rows]
    again += ["--set=model.dtype=float32", "--set=data.max_length=640"]
    done = CliRunner().invoke(app, [*again, "--set=evaluate.max_new_tokens=3"])
    assert done.exit_code == 2
    assert "the weights of the base model are others" in done.output


def test_what_an_evaluation_was_made_with_is_written_down(place):
    evaluated(place, "lora", f"--data={place / 'one.jsonl'}", "--language=en")
    made = read_json(place / "scores-lora/provenance.json")
    assert made["settings"]["model"]["name"] == str(place / "base")
    assert made["dtype"] == "torch.float32"
    assert made["adapter"] == str(place / "lora")
    assert made["data"]["target"]["splits"]["test"] == [f"q{n}" for n in range(6)]


def test_losses_over_other_tokens_are_not_compared(place):
    evaluated(place, "lora", f"--data={place / 'one.jsonl'}", "--language=en")
    ours = place / "scores-lora/predictions.jsonl"
    theirs = place / "theirs.jsonl"
    rows = [row | {"tokens": row["tokens"] + 1} for row in read_jsonl(ours)]
    theirs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = place / "both.json"
    arguments = ["score", str(ours), "--against", str(theirs), f"--json={out}"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    told = read_json(out)
    assert told["loss"]["difference"] is None
    assert "different numbers of tokens" in told["loss"]["settings"]["missing"]
    assert told["chrf"]["difference"] == 0
    asked = CliRunner().invoke(app, [*arguments[:4], "--metrics=loss"])
    assert asked.exit_code == 2
    assert "loss cannot be compared" in asked.output


def test_rows_are_cut_to_the_positions_a_model_has(place):
    tiny_backbone_folder(place / "gpt2", "gpt2")
    row = {"id": "a", "context": "So it is. " * 200, "question": "Is it?", "answers": ["So"]}
    (place / "far.jsonl").write_text(json.dumps(row) + "\n")
    far = ["evaluate", str(place / "gpt2"), f"--data={place / 'far.jsonl'}", "--language=en"]
    far += ["--out", str(place / "far"), "--set=data.max_length=99999"]
    done = CliRunner().invoke(app, [*far, "--set=evaluate.max_new_tokens=3"])
    assert done.exit_code == 0, done.output
    assert read_jsonl(place / "far/predictions.jsonl")[0]["loss"] > 0


def test_overwriting_keeps_the_old_result_until_the_new_one_is_there(place):
    tiny_backbone_folder(place / "other", width=32)
    rows = [f"--data={place / 'one.jsonl'}", "--language=en"]
    before = evaluated(place, "lora", *rows)
    out = place / "scores-lora"
    wrong = ["evaluate", str(place / "lora"), "--out", str(out), *rows, "--overwrite"]
    done = CliRunner().invoke(app, [*wrong, "--model", str(place / "other")])
    assert done.exit_code == 2
    assert read_json(out / "scores.json") == before
    evaluated(place, "lora", *rows, "--overwrite")
    assert not list(place.glob("scores-lora.*")), "neither the old one nor work is left"
    assert read_json(out / "scores.json") == before


def test_an_adapter_put_on_another_base_than_it_names_is_told(place):
    path = place / "lora/adapter_config.json"
    named = json.loads(path.read_text()) | {"base_model_name_or_path": "someone/else"}
    path.write_text(json.dumps(named))
    rows = [f"--data={place / 'one.jsonl'}", "--language=en", f"--model={place / 'base'}"]
    arguments = ["evaluate", str(place / "lora"), "--out", str(place / "out"), *rows]
    done = CliRunner().invoke(app, [*arguments, "--set=evaluate.max_new_tokens=2"])
    assert done.exit_code == 0, done.output
    assert "names someone/else as its base model" in " ".join(done.output.split())


def loss_in(scores: dict[str, Any]) -> float:
    return scores["sets"]["test"]["scores"]["loss"]["value"]


def test_the_bare_model_is_bare_where_an_adapter_lies_in_its_folder(place):
    rows = (f"--data={place / 'one.jsonl'}", "--language=en")
    bare, adapted = (loss_in(evaluated(place, name, *rows)) for name in ("base", "lora"))
    assert adapted != pytest.approx(bare)
    tiny_adapter_folder(place / "base", tiny_model("llama"), r=4)
    assert loss_in(evaluated(place, "none", *rows)) == bare


CHATML = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"


def test_a_chat_template_that_only_the_adapter_has_is_used(place):
    rows = (f"--data={place / 'one.jsonl'}", "--language=en", "--set=data.chat=true")
    shutil.copytree(place / "lora", place / "plain")
    (place / "lora/chat_template.jinja").write_text(CHATML)
    found = loss_in(evaluated(place, "lora", *rows))
    (place / "base/chat_template.jinja").write_text(CHATML)
    assert loss_in(evaluated(place, "plain", *rows)) == found


def test_the_chat_template_of_the_adapter_goes_first_and_another_is_told(place):
    rows = (f"--data={place / 'one.jsonl'}", "--language=en", "--set=data.chat=true")
    (place / "base/chat_template.jinja").write_text(CHATML)
    bases = evaluation(place, "lora", *rows)
    own = place / "lora/chat_template.jinja"
    own.write_text(CHATML.replace("<s>", "<<").replace("</s>", ">>"))
    refused = evaluation(place, "lora", *rows)
    assert refused.exit_code == 2
    assert "the chat template of the adapters is another" in refused.output.replace("\n", " ")
    before = loss_in(read_json(out_of(place, "lora") / "scores.json"))
    changed = evaluation(place, "lora", *rows, "--overwrite")
    line = f"the chat template is the one saved in {place / 'lora'}; the base model has another"
    assert line in " ".join(changed.output.split())
    assert line not in " ".join(bases.output.split())
    after = loss_in(read_json(out_of(place, "lora") / "scores.json"))
    assert after != pytest.approx(before)
    # Reference: the same template on the base model.
    own.rename(place / "base/chat_template.jinja")
    assert loss_in(evaluated(place, "lora", *rows, "--overwrite")) == after


def trials(folder, losses):
    for number, loss in enumerate(losses):
        write_json(folder / str(number) / "stage.json", {"best": {"step": 0, "loss": loss}})
    return {f"trial {number}": folder / str(number) for number in range(len(losses))}


def test_the_trial_with_the_lowest_finite_loss_is_scored(tmp_path):
    found = chosen_adapter(trials(tmp_path, [math.nan, 2.0, math.inf, 1.0]))
    assert found == tmp_path / "3"
    with pytest.raises(ValueError, match="none of the 2 trials has a finite dev loss"):
        chosen_adapter(trials(tmp_path, [math.nan, math.nan]))
