"""The whole job on tiny random models of many architectures."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

import pages
from architectures import (
    ARCHITECTURES,
    ENCODER_DECODERS,
    OTHERS,
    Architecture,
    Other,
    table,
)
from grasp_lora.base.files import read_jsonl
from grasp_lora.config.run_config import RunConfig, make_config
from grasp_lora.models.attention import can_pack
from grasp_lora.models.backbones import ModelSpec, load_tokenizer
from grasp_lora.models.example_losses import (
    can_share_prefix,
    example_losses,
    losses_from_logits,
)
from grasp_lora.plans.run import run
from grasp_lora.sharing.export import Request, write_export
from grasp_lora.tasks.encoding import EncodedExample, PackingCollator
from grasp_lora.workbench.context import Context, open_context
from helpers import logits_of, random_ids
from jobs import job, write_rows

ROWS = {"train": range(4), "dev": range(4, 8), "micro_dev": range(8, 12), "test": range(12, 16)}
MODELS: Any = pytest.mark.parametrize("one", ARCHITECTURES, ids=lambda one: one.type)


def settings(folder: Path, targets: tuple[str, ...] | str, dtype: str = "float32") -> RunConfig:
    files = {
        role: {
            part: str(write_rows(folder / f"{role}-{part}.jsonl", span, role))
            for part, span in ROWS.items()
            if role == "es" or part in ("train", "dev")
        }
        for role in ("en", "es")
    }
    values = job(
        folder,
        model={"name": str(folder / "base"), "dtype": dtype, "device": "cpu"},
        data={
            "max_length": 400,
            "source": {"language": "en", "files": files["en"]},
            "target": {"language": "es", "files": files["es"]},
        },
        controller={"rounds": 2, "rows": 2},
        lora={"r": 2, "target_modules": targets},
        train={"epochs": 1, "batch_size": 2},
    )
    return make_config(values)


def plain_model(folder: Path) -> PreTrainedModel:
    """Return the base as a program without this library loads it, with the textbook attention."""
    loading: Any = {"dtype": torch.float32, "attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **loading).eval()


def loss_by_hand(model: torch.nn.Module, row: EncodedExample) -> float:
    """Return the mean cross-entropy of the answer of one row, read alone and whole."""
    ids = torch.tensor([row.input_ids])
    answer = ids[0, row.prompt_length :]
    logits = logits_of(model, ids)[0, row.prompt_length - 1 : -1].float()
    return float(F.cross_entropy(logits, answer))


def greedy(model: PeftModel, opened: Context, row: EncodedExample) -> str:
    """Return the text of two tokens that transformers itself generates."""
    ids = torch.tensor([row.input_ids[: row.prompt_length]])
    stop, pad = list(opened.backbone.stop_ids), opened.backbone.pad_id
    made = model.generate(
        input_ids=ids, max_new_tokens=2, do_sample=False, eos_token_id=stop, pad_token_id=pad
    )
    tokens = made[0, ids.shape[1] :]
    return str(opened.backbone.tokenizer.decode(tokens, skip_special_tokens=True)).strip()


@MODELS
def test_the_whole_job_ends_in_an_adapter_that_plain_peft_reads(tmp_path, one: Architecture):
    base = one.save(tmp_path / "base")
    config = settings(tmp_path, one.targets)
    out = run(config, quiet=True)
    request = Request(out / "final", "peft", tmp_path / "peft", "float32", model=str(base))
    exported = write_export(request, lambda line: None)
    ids = random_ids(length=90)
    kept = PeftModel.from_pretrained(plain_model(base), str(out / "final"))
    sent = PeftModel.from_pretrained(plain_model(base), str(exported))
    bare = logits_of(plain_model(base), ids)
    assert not torch.allclose(logits_of(kept, ids), bare, atol=1e-3)
    torch.testing.assert_close(logits_of(sent, ids), logits_of(kept, ids), atol=1e-4, rtol=1e-4)
    opened = open_context(config, quiet=True)
    rows = opened.encoded("target", "test")
    told = read_jsonl(out / "evaluations/final/predictions.jsonl")
    wanted = [loss_by_hand(sent, row) for row in rows]
    assert [row["loss"] for row in told] == pytest.approx(wanted, abs=1e-3)
    assert [row["prediction"] for row in told] == [greedy(sent, opened, row) for row in rows]


@MODELS
def test_losses_in_bfloat16_are_those_of_the_textbook_attention(tmp_path, one: Architecture):
    base = one.save(tmp_path / "base")
    opened = open_context(settings(tmp_path, one.targets, dtype="bfloat16"), quiet=True)
    model = opened.backbone.model
    plain = plain_model(base)
    rows = opened.rows("target", ["train", "dev"])
    wanted = [loss_by_hand(plain, row) for row in rows.encoded]
    found = example_losses(model, rows.batches(range(len(wanted))), len(wanted))
    assert found == pytest.approx(wanted, abs=0.05)
    packs = can_pack(model) and can_share_prefix(model, opened.longest)
    batch = (PackingCollator() if packs else opened.collator)(rows.encoded)
    labels = batch.pop("labels")
    with torch.no_grad():
        together = losses_from_logits(model(**batch).logits, labels).tolist()
    if packs:
        wanted = [np.average(wanted, weights=[row.label_tokens for row in rows.encoded])]
    assert together == pytest.approx(wanted, abs=0.05), "as they are read in training"


REFUSED = [(one, targets) for one in (*ARCHITECTURES, *ENCODER_DECODERS) for targets in one.refused]


@pytest.mark.parametrize(
    ("one", "targets"), REFUSED, ids=[f"{one.type}-{targets}" for one, targets in REFUSED]
)
def test_what_cannot_be_adapted_is_refused_by_name_before_any_work(tmp_path, one, targets):
    one.save(tmp_path / "base")
    wanted = targets if targets == "all-linear" else (targets,)
    message = refused(settings(tmp_path, wanted), one.refused[targets])
    if "all-linear" in one.refused:
        assert "all-linear" not in message, "nothing is advised that is refused as well"


@pytest.mark.parametrize("one", OTHERS, ids=lambda one: one.type)
def test_what_writes_no_text_is_refused_before_any_work(tmp_path, one: Other):
    base = one.save(tmp_path / "base")
    refused(settings(tmp_path, "all-linear"), f"({one.type}) is {one.kind}; only causal language")
    with pytest.raises(ValueError, match=one.kind):  # as `plan` does, which reads no weights
        load_tokenizer(ModelSpec(str(base)))


def refused(config: RunConfig, said: str) -> str:
    """Run; check that the error is one line that says it, and that there is no result."""
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        run(config, quiet=True)
    assert "\n" not in str(caught.value)
    assert not config.output.exists()
    return str(caught.value)


def test_the_docs_have_the_table_of_these_models():
    assert table() in (pages.ROOT / "docs/run.md").read_text(encoding="utf-8")
