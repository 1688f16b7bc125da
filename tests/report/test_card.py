"""The model card: what hubs read of it, and that texts from outside stay texts."""

import json

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from grasp_lora.adapters.folder import write_adapter
from grasp_lora.base.files import read_json, write_json
from grasp_lora.models.modules import base_fingerprint
from grasp_lora.report.card import CardFacts, facts_of_run, served_rank, write_card
from grasp_lora.tasks.base import TASKS
from helpers import tiny_model, tiny_peft_model

HOSTILE = "<script>alert(1)</script> [x](http://y) | `z`"
PROMPT = "Answer.\n```\n{context}\n{question}\n"


def adapter(folder, base_name="owner/name", extra=None):
    model = tiny_model()
    layers = tiny_peft_model(model, r=2).state_dict()
    modules = {}
    for key, tensor in layers.items():
        if "lora_A" in key:
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight")
            modules[name] = (tensor, layers[key.replace("lora_A", "lora_B")])
    return write_adapter(
        folder,
        modules,
        model=model,
        base_name=base_name,
        fingerprint=base_fingerprint(model),
        extra=extra,
    )


def run_folder(folder, test_set=HOSTILE):
    scores = {
        "exact_match": {"value": 34.0, "low": 26.9, "high": 41.7, "n": 100},
        "loss": {"value": 0.9642, "low": None, "high": None, "n": 100},
        "perplexity": {"value": None, "low": None, "high": None, "n": 100},
    }
    system = {"slug": "final", "sets": {test_set: {"n": 100, "scores": scores}}}
    data = {"task": "qa", "chat": True, "source": {"language": "en"}}
    data |= {"target": {"language": "vi", "prompt": PROMPT}}
    rows = {"splits": {"train": ["a", "b"], "dev": ["c"]}, "from": HOSTILE}
    for name, value in {
        "config": {"config": {"data": data}},
        "ratio": {"ratio": 0.25, "verdict": "found"},
        "scores": {"systems": [system]},
        "recipe": {"ships": f"mean of 2 {HOSTILE}"},
        "provenance": {"seed": 42, "packages": {"peft": "0.21", "none": None}},
        "data": {"target": rows},
    }.items():
        write_json(folder / f"{name}.json", value)
    return folder


def test_hubs_read_base_languages_and_scores_with_their_intervals(tmp_path):
    facts = facts_of_run(run_folder(tmp_path, "test"))
    card = ModelCard.load(write_card(adapter(tmp_path / "final"), facts))
    assert card.data.base_model == "owner/name"
    assert card.data.library_name == "peft"
    assert card.data.language == ["vi", "en"]
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "qa in vi"
    found = {one.metric_type: one for one in results}
    assert found.keys() == {"exact_match", "loss"}
    assert found["exact_match"].task_type == "question-answering"
    assert found["exact_match"].metric_value == 34.0
    assert found["exact_match"].metric_args == {"low": 26.9, "high": 41.7, "n": 100}
    assert "| test | 100 | exact match | 34.0 | 26.9 to 41.7 |" in card.text
    assert "| prune ratio | 0.250 (verdict: found) |" in card.text
    assert "--max-lora-rank 8 " in card.text
    assert "chat template" in card.text


def test_no_text_from_outside_becomes_a_link_an_element_or_the_end_of_a_block(tmp_path):
    facts = facts_of_run(run_folder(tmp_path))
    card = ModelCard.load(write_card(adapter(tmp_path / "final"), facts))
    assert "<script>" not in card.text
    assert "[x](http://y)" not in card.text.replace(r"\[", "")
    assert "````\nAnswer.\n```\n{context}\n{question}\n\n````" in card.text
    rows = [line for line in card.text.splitlines() if line.startswith("| target rows")]
    assert len(rows) == 1
    assert rows[0].replace(r"\|", "").count("|") == 3


def test_a_backbone_of_a_gguf_file_is_named_as_such(tmp_path):
    extra = {"base_file": {"name": "small.gguf", "sha256": "a" * 64}}
    folder = adapter(tmp_path / "final", extra=extra)
    text = write_card(folder, CardFacts("x")).read_text(encoding="utf-8")
    assert f"the weights of the GGUF file small.gguf (SHA-256 {'a' * 64}), dequantised" in text
    assert json.loads((folder / "grasp_lora.json").read_text())["base_fingerprint"] in text


def test_without_a_prompt_of_its_own_the_template_of_the_language_is_in_force(tmp_path):
    config = read_json(run_folder(tmp_path) / "config.json")
    config["config"]["data"]["target"]["prompt"] = None
    write_json(tmp_path / "config.json", config)
    facts = facts_of_run(tmp_path)
    assert facts is not None
    assert facts.prompt == TASKS["qa"].prompts["vi"]
    (tmp_path / "scores.json").unlink()
    assert facts_of_run(tmp_path) is None


def test_without_a_name_scores_or_prompt_the_card_says_so(tmp_path):
    card = ModelCard.load(write_card(adapter(tmp_path / "final", None), CardFacts("x")))
    assert card.data.base_model is None
    assert "| base model | not named: set model.public_name |" in card.text
    assert "nothing was scored" in card.text
    assert "is not known here" in card.text


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (2, 8), (8, 8), (65, 128), (257, 320)])
def test_ranks_are_rounded_up_to_those_vllm_takes(rank, served):
    assert served_rank(rank) == served


def test_a_rank_that_vllm_does_not_take_is_refused():
    with pytest.raises(ValueError, match="up to rank 512, this one has rank 513"):
        served_rank(513)
