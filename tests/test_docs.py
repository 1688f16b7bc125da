"""README and docs are true: blocks run, commands are taken, links lead somewhere."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig

import grasp_lora
import pages
from helpers import tiny_backbone_folder, tiny_model, tiny_peft_model, tiny_tokenizer

BLOCKS = pages.all_blocks()


def of(*languages: str) -> Any:
    found = [one for one in BLOCKS if one.language in languages]
    assert found
    return pytest.mark.parametrize("block", found, ids=str)


def test_every_block_says_what_it_is():
    unknown = [str(one) for one in BLOCKS if one.language not in pages.LANGUAGES]
    assert unknown == [], f"say one of {pages.LANGUAGES} behind the fence"


@of("sh", "console")
def test_the_commands_of_a_block_are_taken(block, tmp_path):
    found = pages.called(pages.commands_in(block), tmp_path)
    assert found, "a block of commands that calls nothing"
    for words in found:
        pages.check_command(words)


@pytest.mark.parametrize(
    ("page", "command"), pages.inline_commands(), ids=lambda one: str(one)[:60]
)
def test_a_command_inside_a_line_is_taken(page, command, tmp_path):
    del page
    (words,) = pages.called(command, tmp_path)
    pages.check_command(words, whole=False)


@of("yaml")
def test_the_settings_of_a_block_are_taken(block):
    pages.check_yaml(block.text)


class Names(dict[str, Any]):
    """What a block of Python finds: a tiny model, rows, and what a script would have imported."""

    def __init__(self, folder: Path, raw: bool):
        super().__init__()
        self.made: dict[str, Callable[[], Any]] = {
            "RatioSearch": lambda: grasp_lora.RatioSearch,
            "grasp_lora": lambda: grasp_lora,
            "Trainer": lambda: importlib.import_module("transformers").Trainer,
            "args": lambda: _arguments("transformers", "TrainingArguments", folder),
            "collator": _collator,
            "model": lambda: tiny_peft_model(tiny_model()),
            "rows": lambda: _rows(24, 1),
            "search": lambda: grasp_lora.RatioSearch(_rows(8, 2)),
            "trainer": lambda: SimpleNamespace(log=lambda numbers: None),
            "micro_dev_rows": lambda: _rows(8, 2),
        }
        if raw:  # a trainer that tokenises by itself, and loads the model by its name
            self.made |= {
                "args": lambda: _arguments("trl", "SFTConfig", folder, bf16=False),
                "SFTTrainer": lambda: importlib.import_module("trl").SFTTrainer,
                "lora": lambda: LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
                "model": lambda: str(tiny_backbone_folder(folder / "base")),
                "rows": lambda: _raw_rows(96, "train"),
                "micro_dev_rows": lambda: _raw_rows(8, "held"),
            }

    def __missing__(self, name: str) -> Any:
        if name not in self.made:
            raise KeyError(name)
        self[name] = self.made[name]()
        return self[name]


def _arguments(package: str, name: str, folder: Path, **more: Any) -> Any:
    values = {"num_train_epochs": 4, "use_cpu": True, "report_to": "none"} | more
    return getattr(importlib.import_module(package), name)(str(folder / "trainer"), **values)


def _collator() -> Any:
    from transformers import DataCollatorForSeq2Seq

    return DataCollatorForSeq2Seq(tiny_tokenizer())


def _rows(count: int, seed: int) -> list[dict[str, list[int]]]:
    ids = [[(7 * seed + 13 * i + j) % 256 for j in range(8)] for i in range(count)]
    return [{"input_ids": one, "labels": [-100] * 4 + one[4:]} for one in ids]


def _raw_rows(count: int, name: str) -> Dataset:
    rows = [{"prompt": f"{name} {i} is", "completion": f" {7 * i}"} for i in range(count)]
    return Dataset.from_list(rows)


# The libraries warn of their own ways, which a block cannot change.
@pytest.mark.filterwarnings("ignore")
@of("python")
def test_a_block_of_python_runs(block, tmp_path, monkeypatch):
    raw = "SFTTrainer" in block.text
    if raw:
        pytest.importorskip("trl", reason="trl is not installed (pip install trl)")
    for one in pages.ROOT.iterdir():
        (tmp_path / one.name).symlink_to(one)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    code = compile(block.text, str(block), "exec")
    exec(code, {}, Names(tmp_path, raw))


@pytest.mark.parametrize("path", [*pages.PAGES, *pages.NOTEBOOKS], ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(path):
    assert pages.broken_links(path) == []


@pytest.mark.parametrize(
    "command",
    [
        "grasp-lora rnu config.yaml",
        "grasp-lora run",
        "grasp-lora run config.yaml --sed 1",
        "grasp-lora run config.yaml --set recipe=grsap",
        "grasp-lora run config.yaml --set train.finetune.epoch=3",
        "grasp-lora run configs/paper.yaml --set budget=none",
        "grasp-lora compare config.yaml --out o --only grsap",
        "grasp-lora compare config.yaml --out o --seeds 1;2",
        "grasp-lora export a --to ggml --out o",
        "grasp-lora export a --check lama.cpp",
        "grasp-lroa run config.yaml",
        "python -m grasp_lora run config.yaml --sed 1",
        "python -m benchmarks.no_such",
        "python -m benchmarks.recorded rnu en-es",
        "python -m benchmarks.levels --jsn levels.json",
        "python -m other.module",
        "python no/such/script.py",
        "torchrun --nproc-per-node 2 -m grasp_lora rnu config.yaml",
        "make no-such-target",
        "pip install grasp-lora",
        "pip install '.[no-such-extra]'",
        "pip install 'grasp-lora[demo,no-such-extra]'",
        "cat $UNSET",
        "rm -rf runs",
        "grasp-lora settings > docs/settings.md",
    ],
)
def test_a_command_that_is_wrong_is_found(command, tmp_path):
    def check() -> None:
        for words in pages.called(command, tmp_path):
            pages.check_command(words)

    with pytest.raises((ValueError, ImportError, pages.UsageError)):
        check()


def test_a_command_that_only_lacks_arguments_may_stand_inside_a_line():
    pages.check_command(["grasp-lora", "run", "--profile"], whole=False)
    pages.check_command(["grasp-lora", "score", "--rules"], whole=False)
    with pytest.raises(pages.UsageError):
        pages.check_command(["grasp-lora", "run", "--profil"], whole=False)


def test_commands_are_read_as_the_shell_reads_them(tmp_path):
    script = """C=a.yaml  # a remark
        for S in 1 "2 3"; do
          grasp-lora run $C \\
              --seed "$S"
        done
    """
    assert pages.called(script, tmp_path) == [
        ["grasp-lora", "run", "a.yaml", "--seed", "1"],
        ["grasp-lora", "run", "a.yaml", "--seed", "2 3"],
    ]


@pytest.mark.parametrize(
    "text",
    [
        "data: {targt: {language: es}}",
        "model: {name: smollm2, quantization: 3bit}",
        "budget: -1",
        "data: {task: qaa}",
        "- a list",
        "{base: base.yaml, languages: {ar: {}}, seeds: []}",
        "{base: base.yaml, languages: {ar: {data.targt.files: a}}}",
        "{base: base.yaml, languages: {ar: {}}, configurations: {a: {methods: [grsap]}}}",
    ],
)
def test_a_setting_that_is_wrong_is_found(text):
    with pytest.raises(ValueError):  # noqa: PT011
        pages.check_yaml(text)


def test_blocks_and_links_of_a_page_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `b` c, d\n\n- item\n\n  ```sh\n  make demo\n  ```\n\n"
        "[a](#a-b-c-d) [b](#b) [c](page.md) [d](none.md#x) ![e](none.png) [f](https://x.y)\n\n"
        '<a id="b"></a>\n\n| [g](page.md#h) |\n|-|\n',
        encoding="utf-8",
    )
    (block,) = pages.blocks_of(page.read_text("utf-8"), "page.md")
    assert (block.line, block.language, block.text) == (5, "sh", "make demo\n")
    assert pages.broken_links(page) == ["none.md#x", "none.png", "page.md#h"]
