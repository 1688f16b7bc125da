"""What the precheck says of adapters trained elsewhere: on which rows, with which prompt."""

import copy
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grasp_lora.config.run_config import load_config, make_config
from grasp_lora.plans.precheck import precheck
from grasp_lora.report.data_words import known_line, prompt_lines
from grasp_lora.tasks.encoding import EncodedExample, encode_examples
from grasp_lora.workbench.asked import template_in_force
from grasp_lora.workbench.context import Context, open_context
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model, tiny_peft_model
from jobs import job, write_job

WIDTH, STEPS, RATE = 32, 120, 0.02


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Context:
    """Return questions whose answers nobody can guess, a random source adapter, and a backbone."""
    folder = tmp_path_factory.mktemp("elsewhere")
    tiny_backbone_folder(folder / "base", width=WIDTH)
    source = str(tiny_adapter_folder(folder / "source", tiny_model(width=WIDTH), seed=99))
    rng = random.Random(0)
    rows = [
        {
            "id": f"q{n}",
            "context": f"{n} {7 * n % 40}",
            "question": "?",
            "answers": ["".join(rng.choices("abcdefgh", k=6))],
        }
        for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    target = {
        "language": "es",
        "files": str(folder / "rows.jsonl"),
        "prompt": "{context}{question} ",
        "rows": {"train": 16, "dev": 16, "micro_dev": 8},
    }
    values = job(
        folder,
        adapters={"source": source, "target": source},
        data={"max_faulty": 1.0, "target": target},
    )
    return open_context(load_config(write_job(folder / "run.yaml", values)), quiet=True)


def trained(rows: Sequence[EncodedExample], folder: Path, seed: int) -> Path:
    """Train an adapter on the answers of rows with a plain loop; return its folder."""
    base = tiny_model(width=WIDTH)
    model = tiny_peft_model(base, r=16, alpha=16, targets="all-linear", seed=seed, zero_b=True)
    weights = [one for one in model.train().parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE)
    shape = len(rows), max(len(row.input_ids) for row in rows)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    for i, row in enumerate(rows):
        ids[i, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels[i, row.prompt_length : len(row.input_ids)] = ids[i, row.prompt_length :][
            : len(row.input_ids) - row.prompt_length
        ]
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def checked(context: Context, target: Path) -> dict:
    adapters = context.config.adapters.model_copy(update={"target": target})
    config = context.config.model_copy(update={"adapters": adapters})
    return precheck(config, rows=4, context=replace(context, config=config))


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BARE = "{context}\n{question}"


@pytest.mark.parametrize(
    ("template", "chat", "name", "settings"),
    [
        (None, False, None, None),
        (BARE, False, "the bare question", [f"data.target.prompt: {json.dumps(BARE)}"]),
        (None, True, "the prompt in the chat template", ["data.chat: true"]),
    ],
)
def test_the_prompt_that_an_adapter_was_trained_with_is_told(
    context, tmp_path, template, chat, name, settings
):
    """Each adapter is trained on the train rows as it is asked; another prompt costs it much."""
    (tmp_path / "adapter").mkdir()
    tokenizer = copy.deepcopy(context.backbone.tokenizer)
    tokenizer.chat_template = TEMPLATE
    asked = template or context.config.data.target.prompt
    examples = context.examples("target", "train")
    rows, _ = encode_examples(examples, context.task, tokenizer, 600, asked, chat=chat)
    folder = trained(rows, tmp_path / "adapter", 0)
    if chat:
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    found = checked(context, folder)["prompts"]
    mine = found["target"]
    assert mine["used"] == "the prompt"
    ways = ["the prompt", "the bare question"]
    more = [f"{way} in the chat template" for way in ways] if chat else []
    assert list(mine["losses"]) == [*ways, *more]
    assert list(found["source"]["losses"]) == ways, "that adapter brings no chat template"
    first, *rest = prompt_lines("target", mine)
    assert first.startswith("adapters.target, loss of 4 train answers: the prompt ")
    if name is None:
        assert mine["better"] is None
        assert rest == []
        return
    better = mine["better"]
    assert (better["name"], better["settings"]) == (name, settings)
    assert better["gain"] == pytest.approx(mine["losses"]["the prompt"] - mine["losses"][name])
    assert better["gain"] > max(1, better["error"])
    (advice,) = rest
    assert advice.endswith(f"to ask so, write {settings[0]}")
    assert context.backbone.tokenizer.chat_template is None, "the tokenizer is left as it was"
    # What is advised can be written, and is how the adapter was asked.
    key, _, value = settings[0].partition(": ")
    config = make_config(context.config.to_dict(), [f"{key}={value}"], training=False)
    assert template_in_force(config, "target", "train") == asked
    assert config.data.chat == chat


@pytest.mark.parametrize("seed", range(2))
def test_rows_that_the_target_adapter_memorised_are_told(context, tmp_path, seed):
    train, micro, dev = (context.encoded("target", s) for s in ("train", "micro_dev", "dev"))
    seen = [*micro, *dev][::2]
    found = checked(context, trained([*train, *seen], tmp_path / "knows", seed))
    known = found["known"]
    assert known is not None
    assert {row.id for row in seen} <= set(known["rows"])
    assert len(known["rows"]) <= len(seen) + 1
    assert known["loss"] < known["others"] / 2
    assert found["forwards"] == 24 * 4 + 3 * 24 + 2 * 2 * 4
    line = known_line(known)
    assert line.startswith(f"adapters.target knows {len(known['rows'])} of 24 dev and micro-dev")

    clean = checked(context, trained(train, tmp_path / "clean", seed))
    assert clean["known"] is None
