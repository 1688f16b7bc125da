"""The whole job on tiny random encoder-decoders, for both tasks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, NllbTokenizer, PreTrainedModel

from architectures import ENCODER_DECODERS, Architecture
from grasp_lora.adapters.folder import write_adapter
from grasp_lora.adapters.opening import model_with_adapter
from grasp_lora.base.files import read_json, read_jsonl, write_json
from grasp_lora.config.run_config import RunConfig, make_config
from grasp_lora.generation import generate
from grasp_lora.models.backbones import ModelSpec, load_backbone, load_tokenizer
from grasp_lora.plans.forecast import shape_of
from grasp_lora.plans.run import run
from grasp_lora.plans.show import sizes_of
from grasp_lora.report.card import write_card
from grasp_lora.sharing.cost import costs
from grasp_lora.sharing.engines import faults_for
from grasp_lora.sharing.export import Request, write_export
from grasp_lora.stages.few_shot import few_shot
from grasp_lora.tasks.base import task_named
from grasp_lora.tasks.prompts import render
from grasp_lora.training.adopt import adopt_adapter
from grasp_lora.workbench.asked import compare_prompts
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.describe import describe_data
from grasp_lora.workbench.rows import load_run_data
from jobs import job, write_rows

ROWS = {"train": range(4), "dev": range(4, 8), "micro_dev": range(8, 12), "test": range(12, 16)}
MODELS: Any = pytest.mark.parametrize("one", ENCODER_DECODERS, ids=lambda one: one.name)
T5, MBART, NLLB = (
    next(one for one in ENCODER_DECODERS if one.name == name) for name in ("T5", "mBART", "NLLB")
)


def write_articles(path: Path, numbers: range, prefix: str) -> Path:
    """Write articles of one's own with their summaries; return the file."""
    rows = [
        {
            "id": f"{prefix}{n}",
            "article": f"{prefix} house {n} has {n + 2} rooms. " * (1 + n % 3),
            "summary": f"It has {n + 2} rooms.",
        }
        for n in numbers
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(folder: Path, one: Architecture, task: str = "qa", **changes: Any) -> RunConfig:
    write = write_rows if task == "qa" else write_articles
    files = {
        role: {
            part: str(write(folder / f"{role}-{part}.jsonl", span, role))
            for part, span in ROWS.items()
            if role == "es" or part in ("train", "dev")
        }
        for role in ("en", "es")
    }
    values = {
        "model": {"name": str(folder / "base"), "dtype": "float32", "device": "cpu"},
        "data": {
            "task": task,
            "max_length": 400,
            "source": {"language": "en", "files": files["en"]},
            "target": {"language": "es", "files": files["es"]},
        },
        "controller": {"rounds": 2, "rows": 2},
        "lora": {"r": 2, "target_modules": list(one.targets)},
        "train": {"epochs": 1, "batch_size": 2},
        "evaluate": {"max_new_tokens": 3, "baselines": False},
    }
    return make_config(job(folder, **(values | changes)))


def plain_model(folder: Path) -> PreTrainedModel:
    """Return the base as a program without this library loads it, with the textbook attention."""
    loading: Any = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForSeq2SeqLM.from_pretrained(folder, **loading).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Return logits of random tokens on both sides."""
    generator = torch.Generator().manual_seed(0)
    read = torch.randint(5, 90, (2, 30), generator=generator)
    written = torch.randint(5, 90, (2, 7), generator=generator)
    with torch.no_grad():
        return model(input_ids=read, decoder_input_ids=written).logits


def in_spanish(one: Architecture) -> Any:
    """Return the tokenizer, set to Spanish by hand."""
    tokenizer = one.tokenizer()
    if hasattr(tokenizer, "src_lang"):
        code = "spa_Latn" if isinstance(tokenizer, NllbTokenizer) else "es_XX"
        tokenizer.src_lang = tokenizer.tgt_lang = code
    return tokenizer


def loss_by_transformers(model: Any, tokenizer: Any, prompt: str, answer: str) -> float:
    """Return the mean cross-entropy of one answer, whose labels transformers shifts."""
    labels = torch.tensor([tokenizer(text_target=answer)["input_ids"]])
    read = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.no_grad():
        found = model(input_ids=read, labels=labels).logits[0]
    language = tokenizer.convert_tokens_to_ids(getattr(tokenizer, "src_lang", "</s>"))
    kept = labels[0] != language if hasattr(tokenizer, "src_lang") else labels[0] >= 0
    return float(functional.cross_entropy(found[kept], labels[0][kept]))


def text_by_transformers(model: Any, one: Architecture, tokenizer: Any, prompt: str) -> str:
    """Return the text of three tokens that transformers generates, as its docs say to."""
    begins: dict[str, Any] = {}
    if hasattr(tokenizer, "src_lang"):
        language = tokenizer.convert_tokens_to_ids(tokenizer.src_lang)
        first = "decoder_start_token_id" if one.name == "mBART" else "forced_bos_token_id"
        begins = {first: language}
    model.generation_config.forced_eos_token_id = None
    most = 3 + ("forced_bos_token_id" in begins)
    read = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = model.generate(input_ids=read, max_new_tokens=most, do_sample=False, **begins)
    return str(tokenizer.decode(made[0], skip_special_tokens=True)).strip()


BOTH_TASKS = [(T5, "summarization"), (NLLB, "summarization")]
BOTH_TASKS += [(one, "qa") for one in ENCODER_DECODERS]


@pytest.mark.parametrize(
    ("one", "task"), BOTH_TASKS, ids=[f"{one.name}-{task}" for one, task in BOTH_TASKS]
)
def test_the_whole_job_ends_in_an_adapter_that_plain_peft_reads(tmp_path, one, task):
    base = one.save(tmp_path / "base")
    config = settings(tmp_path, one, task)
    out = run(config, quiet=True)
    request = Request(out / "final", "peft", tmp_path / "peft", "float32", model=str(base))
    exported = write_export(request, lambda line: None)
    kept = PeftModel.from_pretrained(plain_model(base), str(out / "final"))
    sent = PeftModel.from_pretrained(plain_model(base), str(exported))
    assert not torch.allclose(logits(kept), logits(plain_model(base)), atol=1e-3)
    torch.testing.assert_close(logits(sent), logits(kept), atol=1e-4, rtol=1e-4)
    for folder in (out / "adapters/source", out / "adapters/target", out / "final", exported):
        assert read_json(folder / "adapter_config.json")["task_type"] == "SEQ_2_SEQ_LM"
    if "v_proj" in one.targets:
        adapted = read_json(exported / "adapter_config.json")["target_modules"]
        assert "model.decoder.layers.1.encoder_attn.v_proj" in adapted
    assert "import AutoModelForSeq2SeqLM, AutoTokenizer" in (out / "report.md").read_text()
    data, tokenizer = load_run_data(config, lambda line: None), in_spanish(one)
    told = read_jsonl(out / "evaluations/final/predictions.jsonl")
    examples = {e.id: e for e in data.parts["target"]["test"]}
    assert len(told) == len(examples) == 4
    for row in told:
        example = examples[row["id"]]
        prompt = render(task_named(task), example).text
        wanted = loss_by_transformers(sent, tokenizer, prompt, example.references[0])
        assert row["loss"] == pytest.approx(wanted, abs=1e-3)
        assert row["prediction"] == text_by_transformers(sent, one, tokenizer, prompt)


@pytest.mark.parametrize("importance", ["obs", "taylor"])
def test_importances_that_read_rows_read_both_sides(tmp_path, importance):
    T5.save(tmp_path / "base")
    config = settings(tmp_path, T5, importance=importance)
    out = run(config, quiet=True)
    assert read_json(out / "ratio.json")["ratio"] >= 0
    assert (out / "final/adapter_model.safetensors").is_file()


def test_a_search_by_scores_generates_in_the_language_of_the_target(tmp_path, monkeypatch):
    one = NLLB
    one.save(tmp_path / "base")
    seen: list[Any] = []
    made = generate._generation_config
    monkeypatch.setattr(
        generate, "_generation_config", lambda r: (seen.append(tuple(r.start)), made(r))[1]
    )
    controller = {"rounds": 1, "rows": 2, "reward": "token_f1"}
    run(settings(tmp_path, one, controller=controller), quiet=True)
    spanish = one.tokenizer().convert_tokens_to_ids("spa_Latn")
    assert set(seen) == {(2, spanish)}


@MODELS
def test_what_is_encoded_without_weights_is_what_the_run_reads(tmp_path, one):
    one.save(tmp_path / "base")
    config = settings(tmp_path, one)
    context = open_context(config, quiet=True)
    data = load_run_data(config, lambda line: None)
    rows = context.encoded("target", "train")
    sizes = sizes_of(config, data)
    assert sizes.lengths[("target", "train")] == [len(row.input_ids) for row in rows]
    assert "adapted modules" not in describe_data(config, quiet=True)
    assert load_tokenizer(ModelSpec(str(tmp_path / "base"))).decoder_start == (
        context.backbone.decoder_start
    )


@MODELS
def test_solved_examples_stand_in_the_prompt_that_the_encoder_reads(tmp_path, one):
    one.save(tmp_path / "base")
    context = open_context(settings(tmp_path, one), quiet=True)
    shots = few_shot(context, 2, [("target", "test")])
    assert shots.reader is None
    asked, alone = shots.rows(("target", "test"))[0], context.encoded("target", "test")[0]
    answer = alone.input_ids[alone.prompt_length :]
    assert asked.input_ids[asked.prompt_length :] == answer
    assert asked.sides == alone.sides
    tokenizer = in_spanish(one)
    example = context.examples("target", "test")[0]
    text = "".join(one.text for one in shots.solved) + "\n\n" + render(context.task, example).text
    assert list(asked.input_ids[: asked.prompt_length]) == tokenizer(text)["input_ids"]


def test_a_run_that_chooses_tries_its_recipes_on_an_encoder_decoder(tmp_path):
    T5.save(tmp_path / "base")
    values = settings(tmp_path, T5).to_record() | {"recipe": "auto", "budget": 8}
    del values["controller"]
    out = run(make_config(values), quiet=True)
    found = read_json(out / "recipe.json")
    losses = {one["name"]: one["dev_loss"] for one in found["simple_systems"]}
    assert {"zero-shot", "few-shot, 4 examples in the prompt"} <= losses.keys()
    assert len({*losses.values(), *(one["dev_loss"] for one in found["tried"])}) >= 4


def test_the_ways_to_ask_are_compared_by_the_losses_of_answers(tmp_path):
    T5.save(tmp_path / "base")
    context = open_context(settings(tmp_path, T5), quiet=True)
    found = compare_prompts(context, "target", saved_adapter(tmp_path, T5), 4)
    assert set(found["losses"]) == {"the prompt", "the bare question"}
    wrapped = PeftModel.from_pretrained(plain_model(tmp_path / "base"), tmp_path / "adapter")
    rows, tokenizer = context.examples("target", "train"), in_spanish(T5)
    wanted = [
        loss_by_transformers(wrapped, tokenizer, render(context.task, row).text, row.references[0])
        for row in rows
    ]
    assert found["losses"]["the prompt"] == pytest.approx(sum(wanted) / 4, abs=1e-4)


def test_a_language_that_the_tokenizer_does_not_know_is_one_error_before_any_work(tmp_path):
    MBART.save(tmp_path / "base")
    values = settings(tmp_path, MBART).to_record()
    values["data"]["target"]["language"] = "yo"
    config = make_config(values)
    with pytest.raises(ValueError, match="knows no language 'yo'") as caught:
        run(config, quiet=True)
    assert "\n" not in str(caught.value)
    assert not config.output.exists()


@pytest.mark.parametrize("to", ["gguf", "gguf-merged", "mlx"])
def test_what_cannot_hold_the_adapter_is_refused_by_name(tmp_path, to):
    T5.save(tmp_path / "base")
    adapter = saved_adapter(tmp_path, T5)
    request = Request(adapter, to, tmp_path / "out", model=str(tmp_path / "base"))
    said = f"--to {to} writes adapters of causal language models alone, and this one is of an enc"
    with pytest.raises(ValueError, match=re.escape(said)):
        write_export(request, lambda line: None)
    assert not (tmp_path / "out").exists()


@MODELS
def test_a_merged_model_has_the_logits_of_the_adapter_on_its_base(tmp_path, one):
    base = one.save(tmp_path / "base")
    adapter = saved_adapter(tmp_path, one)
    request = Request(adapter, "merged", tmp_path / "out", "float32", model=str(base))
    out = write_export(request, lambda line: None)
    wanted = logits(PeftModel.from_pretrained(plain_model(base), str(adapter)))
    torch.testing.assert_close(logits(plain_model(out)), wanted, atol=1e-4, rtol=1e-4)
    assert "AutoModelForSeq2SeqLM" in (out / "serve.txt").read_text()


def saved_adapter(folder: Path, one: Architecture, **changes: Any) -> Path:
    """Save a random adapter of plain PEFT for the base in a folder; return its folder."""
    values: dict[str, Any] = {"r": 2, "target_modules": list(one.targets)}
    values |= {"task_type": "SEQ_2_SEQ_LM", "init_lora_weights": False}
    torch.manual_seed(0)
    wrapped = get_peft_model(plain_model(folder / "base"), LoraConfig(**(values | changes)))
    wrapped.save_pretrained(str(folder / "adapter"))
    return folder / "adapter"


def test_only_adapters_of_its_kind_are_put_on_an_encoder_decoder(tmp_path):
    T5.save(tmp_path / "base")
    backbone = load_backbone(ModelSpec(str(tmp_path / "base"), "float32", device="cpu"))
    bare = logits(backbone.model)
    adapter = saved_adapter(tmp_path, T5)
    wanted = logits(PeftModel.from_pretrained(plain_model(tmp_path / "base"), str(adapter)))
    with model_with_adapter(backbone, adapter) as model:
        torch.testing.assert_close(logits(model), wanted, atol=1e-4, rtol=1e-4)
    file = adapter / "adapter_config.json"
    write_json(file, read_json(file) | {"task_type": "CAUSAL_LM"})
    said = "made for the task type 'CAUSAL_LM', but this model is of SEQ_2_SEQ_LM"
    with pytest.raises(ValueError, match=said), model_with_adapter(backbone, adapter):
        pass
    assert logits(backbone.model).equal(bare)


def test_a_learned_prompt_of_an_encoder_decoder_is_refused(tmp_path):
    T5.save(tmp_path / "base")
    settled = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
    wrapped = get_peft_model(plain_model(tmp_path / "base"), settled)
    wrapped.save_pretrained(str(tmp_path / "adapter"))
    backbone = load_backbone(ModelSpec(str(tmp_path / "base"), "float32", device="cpu"))
    said = "a PROMPT_TUNING adapter of an encoder-decoder cannot be evaluated here"
    with pytest.raises(ValueError, match=said), model_with_adapter(backbone, tmp_path / "adapter"):
        pass


@pytest.mark.parametrize("task", ["SEQ_2_SEQ_LM", None])
def test_the_search_in_other_trainers_is_refused(tmp_path, task):
    T5.save(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q"], task_type=task)
    wrapped = get_peft_model(plain_model(tmp_path / "base"), lora)
    with pytest.raises(ValueError, match=r"is for 'SEQ_2_SEQ_LM'; only causal language models"):
        adopt_adapter(wrapped)


def test_engines_say_that_they_serve_no_encoder_decoder(tmp_path):
    T5.save(tmp_path / "base")
    adapter = saved_adapter(tmp_path, T5)
    for engine in ("vllm", "sglang", "llama.cpp"):
        assert faults_for(engine, adapter) == [
            "task_type is SEQ_2_SEQ_LM: it is not known to serve adapters of encoder-decoders"
        ]


def test_a_card_loads_the_base_by_its_own_class_and_names_no_server(tmp_path):
    T5.save(tmp_path / "base")
    backbone = load_backbone(ModelSpec(str(tmp_path / "base"), "float32", device="cpu"))
    name = "encoder.block.0.layer.0.SelfAttention.q"
    pair = {name: (torch.ones(2, 32), torch.ones(32, 2))}
    folder = write_adapter(
        tmp_path / "adapter",
        pair,
        model=backbone.model,
        base_name="owner/name",
        fingerprint=backbone.fingerprint,
    )
    card = write_card(folder, None).read_text()
    assert 'AutoModelForSeq2SeqLM.from_pretrained("owner/name")' in card
    assert "vllm serve" not in card
    assert "--to gguf" not in card
    assert "pipeline_tag" not in card


def test_what_adapters_cost_is_measured(tmp_path):
    T5.save(tmp_path / "base")
    backbone = load_backbone(ModelSpec(str(tmp_path / "base"), "float32", device="cpu"))
    bare, one = costs([saved_adapter(tmp_path, T5)], backbone)
    assert bare.speed > 0
    assert one.rank == 2


def test_the_time_of_an_encoder_decoder_is_not_predicted():
    with pytest.raises(ValueError, match=r"encoder-decoder \(t5\) is not predicted"):
        shape_of(T5.model().config)


def test_a_decoder_whose_beginning_is_not_known_is_refused(tmp_path):
    base = T5.save(tmp_path / "base")
    (base / "generation_config.json").unlink()
    file = base / "config.json"
    write_json(file, read_json(file) | {"decoder_start_token_id": None, "bos_token_id": None})
    for load in (load_backbone, load_tokenizer):
        with pytest.raises(ValueError, match="does not say how its decoder begins"):
            load(ModelSpec(str(base), "float32", device="cpu"))


def test_shards_of_an_encoder_decoder_are_refused_by_name(tmp_path, monkeypatch):
    base = T5.save(tmp_path / "base")
    monkeypatch.setattr("grasp_lora.models.backbones.shards_wanted", lambda: True)
    with pytest.raises(ValueError, match=r"\(t5\) is an encoder-decoder, which is not cut into"):
        load_backbone(ModelSpec(str(base), "float32", device="cpu"))


def test_its_attention_is_that_of_transformers_in_bfloat16_too(tmp_path):
    base = T5.save(tmp_path / "base")
    backbone = load_backbone(ModelSpec(str(base), "bfloat16", device="cpu"))
    assert backbone.model.config._attn_implementation == "sdpa"
    plain = plain_model(base)
    assert float((logits(backbone.model).float() - logits(plain)).abs().max()) < 0.5
