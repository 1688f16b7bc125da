"""What a context gives the stages: here the examples on which losses are measured."""

import json
import os
from dataclasses import replace

import pytest

from grasp_lora.config.run_config import make_config
from grasp_lora.models.example_losses import example_losses
from grasp_lora.workbench.context import open_context
from helpers import ARCHITECTURES, tiny_backbone_folder
from jobs import job


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_text_is_read_once_for_all_questions_about_it(arch, tmp_path):
    tiny_backbone_folder(tmp_path / "base", arch)
    text = "No. 7 has four rooms."
    rows = [
        {"id": str(n), "context": text, "question": f"Why {n}?", "answers": ["four"]}
        for n in range(6)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = job(tmp_path, evaluate={"batch_size": 6})
    # A sliding window must hold a whole example, or nothing is shared.
    prompt = "{context} {question}"
    files = {"test": str(tmp_path / "rows.jsonl")}
    values["data"] = {"target": {"language": "en", "prompt": prompt, "files": files}}
    context = open_context(make_config(values, training=False), quiet=True, training=False)

    shared = context.rows("target", ["test"])
    ids = [row.input_ids for row in shared.encoded]
    longest = max(len(one) for one in ids)
    model, places = context.backbone.model, range(len(rows))
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, inputs: read.append(inputs[0].numel())
    )
    found = example_losses(model, replace(shared, forward_tokens=1).batches(places), len(rows))
    hook.remove()
    common = len(os.path.commonprefix(ids))
    assert common > len(text)
    assert sum(read) == common + len(rows) * (longest - common)
    alone = replace(shared, share_prefix=False, batch_size=1).batches(places)
    assert found == pytest.approx(example_losses(model, alone, len(rows)), abs=1e-5)
