"""The ratio search in a plain `transformers.Trainer`, on a PeftModel that was built elsewhere."""

import json
import math
import os
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from grasp_lora.adapters.merging import merge_adapters
from grasp_lora.core.controller.rounds import state_to_json
from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.pruning.masks import pruned_count
from grasp_lora.models.token_rows import token_row
from grasp_lora.training.ratio_search import RatioSearch
from helpers import (
    logits_of,
    random_ids,
    tiny_adapter_folder,
    tiny_model,
    tiny_peft_model,
    tiny_tokenizer,
)

CONFIG = ControllerConfig(rounds=3, rows=4, low=0.3, max_step=0.3)
STEPS = 12
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {one.name for one in fields(TrainingArguments)}
)
"""The setting's name in the installed transformers."""


class Crash(RuntimeError):
    pass


class CrashAt(TrainerCallback):
    def __init__(self, step: int | None):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Crash


class Watch(TrainerCallback):
    """Notes after every optimizer step which entries of the adapter are zero."""

    def __init__(self):
        self.zeros: dict[int, list[float]] = {}

    def on_step_end(self, args, state, control, model, **kwargs):
        trained = [p for p in model.parameters() if p.requires_grad]
        self.zeros[state.global_step] = [float((p == 0).float().mean()) for p in trained]


def rows_of(count: int, seed: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(6, 14, (1,), generator=generator))
        ids = torch.randint(1, 256, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length - 3) + ids[-3:]})
    return rows


MICRO_DEV = rows_of(8, 2)


def trainer_of(
    out: Path,
    search: RatioSearch | None,
    model: Any = None,
    others: list[TrainerCallback] = (),
    **settings: Any,
) -> Trainer:
    values = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 4,
        "learning_rate": 0.02,
        "weight_decay": 0.05,
        "save_steps": 2,
        "logging_steps": 1,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return Trainer(
        tiny_peft_model(tiny_model(), lora_dropout=0.1) if model is None else model,
        TrainingArguments(str(out), **(values | settings)),
        train_dataset=Dataset.from_list(rows_of(10, 1)),
        eval_dataset=Dataset.from_list(rows_of(4, 3)),
        data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        callbacks=[one for one in (search, *others) if one is not None],
    )


def searched(out: Path, search: RatioSearch | None = None, **settings: Any):
    """Return (search, trainer) after a whole training."""
    search = search or RatioSearch(MICRO_DEV, controller=CONFIG)
    trainer = trainer_of(out, search, **settings)
    trainer.train()
    assert trainer.state.global_step == STEPS
    return search, trainer


def factors(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    end = f".{adapter}.weight"
    return {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(end)}


def assert_pruned_at(model: PeftModel, ratio: float, adapter: str = "default") -> None:
    found = factors(model, adapter)
    assert found
    for name, factor in found.items():
        assert int((factor == 0).sum()) == pruned_count(factor.numel(), ratio), name


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One search that was not stopped, with all that happened in it."""
    watch = Watch()
    out = tmp_path_factory.mktemp("whole")
    search, trainer = searched(out, others=[watch], save_total_limit=None)
    return SimpleNamespace(search=search, trainer=trainer, watch=watch, out=out)


def test_the_adapter_is_pruned_at_the_chosen_ratio_when_the_training_ends(whole):
    search = whole.search
    assert len(search.rounds) == 3
    assert [record.step for record in search.rounds] == [3, 6, 9]
    assert 0.3 <= search.ratio == search.choice.ratio <= 0.8
    assert search.verdict in ("learned", "flat")
    assert_pruned_at(whole.trainer.model, search.ratio)


def test_the_mask_of_the_last_commit_holds_after_every_step(whole):
    committed = {record.step: record.mask_ratio for record in whole.search.rounds}
    for step, zeros in whole.watch.zeros.items():
        if step < 3:
            assert zeros == [0.0] * len(zeros)
        elif step not in committed:  # a round follows the step of its number
            ratio = committed[max(s for s in committed if s < step)]
            assert zeros == pytest.approx([ratio] * len(zeros), abs=0.02)


def test_the_saved_folder_is_an_ordinary_adapter(whole, tmp_path):
    folder = whole.search.save(tmp_path / "final")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        p.name for p in folder.iterdir()
    }
    loaded = PeftModel.from_pretrained(tiny_model(), str(folder))
    assert_pruned_at(loaded, whole.search.ratio)
    ids = random_ids()
    assert torch.equal(logits_of(loaded.eval(), ids), logits_of(whole.trainer.model.eval(), ids))
    notes = json.loads((folder / "grasp_lora.json").read_text())
    assert (notes["ratio"], notes["verdict"]) == (whole.search.ratio, whole.search.verdict)


def test_a_file_in_the_place_of_the_folder_is_told(whole, tmp_path):
    (tmp_path / "final").write_text("mine")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        whole.search.save(tmp_path / "final")


@pytest.mark.parametrize("crash_at", [2, 5, 8, 11])
def test_a_resumed_search_equals_an_uninterrupted_one(whole, tmp_path, crash_at):
    with pytest.raises(Crash):
        trainer_of(
            tmp_path, RatioSearch(MICRO_DEV, controller=CONFIG), others=[CrashAt(crash_at)]
        ).train()
    search = RatioSearch(MICRO_DEV, controller=CONFIG)
    resumed = trainer_of(tmp_path, search)
    if crash_at == 2:  # the first checkpoint is written after the crash
        resumed.train()
    else:
        resumed.train(resume_from_checkpoint=True)
    one, other = factors(whole.trainer.model), factors(resumed.model)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert search.choice == whole.search.choice
    assert search.rounds == whole.search.rounds
    assert losses(resumed) == losses(whole.trainer)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["accumulation", "checkpointing", "autocast"])
def test_probes_change_nothing_of_the_training(tmp_path, kind):
    """A search that never commits trains bit for bit like none: each trial is worse than none."""
    settings = {
        "accumulation": {},
        "checkpointing": {CHECKPOINTING: True},
        "autocast": {"bf16": True},
    }[kind]
    config = ControllerConfig(rounds=3, rows=4, low=0.3, baseline=True)
    read: list[int] = []

    def worse_when_pruned(model, rows):
        assert not model.training
        assert not torch.is_grad_enabled()
        read.append(len(rows))
        torch.rand(1)
        pruned = any(bool((p == 0).any()) for n, p in model.named_parameters() if "lora_" in n)
        with torch.no_grad():
            model(input_ids=random_ids())
        return torch.full((len(rows),), float(pruned))

    search = RatioSearch(MICRO_DEV, controller=config, objective=worse_when_pruned)
    _, probed = searched(tmp_path / "a", search, **settings)
    assert read == [4] * 12
    assert not any(record.committed for record in search.rounds)
    plain = trainer_of(tmp_path / "b", None, **settings)
    plain.train()
    assert losses(probed) == losses(plain)


@pytest.mark.parametrize(
    "kind",
    [
        "checkpointing",
        "autocast",
        "sgd",
        "rslora",
        pytest.param("compile", marks=pytest.mark.slow),
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("g++"), reason="no g++, which inductor needs"),
                pytest.mark.filterwarnings("ignore:`torch.jit.script_method`"),
            ],
        ),
    ],
)
def test_searches_under_the_trainers_other_settings(tmp_path, kind):
    settings: dict[str, Any] = {
        "checkpointing": {CHECKPOINTING: True},
        "autocast": {"bf16": True},
        "compile": {"torch_compile": True, "torch_compile_backend": "eager"},
        "inductor": {"torch_compile": True, "torch_compile_backend": "inductor"},
        "sgd": {"optim": "sgd"},
        "rslora": {
            "model": tiny_peft_model(
                tiny_model(),
                targets=["q_proj", "down_proj"],
                use_rslora=True,
                rank_pattern={"q_proj": 3},
                alpha_pattern={"q_proj": 5},
            )
        },
    }[kind]
    search, trainer = searched(tmp_path / "out", **settings)
    assert len(search.rounds) == 3
    assert_pruned_at(trainer.model, search.ratio)
    loaded = PeftModel.from_pretrained(tiny_model(), str(search.save(tmp_path / "final")))
    ids = random_ids()
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    assert torch.allclose(logits_of(loaded.eval(), ids), logits_of(trained, ids), atol=1e-5)


class Scaling(Trainer):
    """A Trainer in float16 with a scaled loss, as on a GPU; Accelerate has no scaler on a CPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)


def test_searches_with_a_scaled_loss_where_steps_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "Trainer", Scaling)
    search = RatioSearch(MICRO_DEV, controller=CONFIG)
    _, trainer = searched(tmp_path / "out", search, fp16=True)
    norms = [one["grad_norm"] for one in trainer.state.log_history if "grad_norm" in one]
    overflowed = sum(not math.isfinite(norm) for norm in norms)
    assert 0 < overflowed < STEPS
    # The scaler halves its scale at each step that it skips.
    assert trainer.accelerator.scaler.get_scale() == 2.0 ** (20 - overflowed)
    assert len(search.rounds) == 3
    assert_pruned_at(trainer.model, search.ratio)
    loaded = PeftModel.from_pretrained(tiny_model(), str(search.save(tmp_path / "final")))
    ids = random_ids()
    trained = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    assert torch.allclose(logits_of(loaded.eval(), ids), logits_of(trained, ids), atol=1e-5)


def test_the_best_checkpoint_is_pruned_at_the_ratio_of_all_rounds(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "learning_rate": 0.5}
    search, trainer = searched(tmp_path / "out", load_best_model_at_end=True, **settings)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name != f"checkpoint-{STEPS}"
    assert len(search.rounds) == 3
    assert_pruned_at(trainer.model, search.ratio)
    kept = PeftModel.from_pretrained(tiny_model(), str(best))
    ended, then = factors(trainer.model), factors(kept)
    # Where neither mask prunes, the weights are those of the checkpoint.
    for name in then:
        both = (ended[name] != 0) & (then[name] != 0)
        assert both.any()
        assert torch.equal(ended[name][both], then[name][both])


def test_one_of_several_adapters_with_a_name_of_its_own(tmp_path):
    model = tiny_peft_model(tiny_model(), seed=3)
    model.add_adapter("mine", model.peft_config["default"])
    model.set_adapter("mine")
    other = factors(model)
    search = RatioSearch(MICRO_DEV, controller=CONFIG, adapter="mine")
    _, trainer = searched(tmp_path / "out", search, model=model)
    assert_pruned_at(model, search.ratio, "mine")
    assert all(torch.equal(other[name], now) for name, now in factors(model).items())
    loaded = PeftModel.from_pretrained(tiny_model(), str(search.save(tmp_path / "final")))
    ids = random_ids()
    assert torch.allclose(logits_of(loaded.eval(), ids), logits_of(model.eval(), ids), atol=1e-6)


def test_an_adapter_with_a_name_of_its_own_resumes(tmp_path):
    def run(out, crash=None, resume=None):
        torch.manual_seed(0)
        model = tiny_peft_model(tiny_model(), seed=3)
        model.add_adapter("mine", model.peft_config["default"])
        model.set_adapter("mine")
        search = RatioSearch(MICRO_DEV, controller=CONFIG)
        trainer = trainer_of(out, search, model, [CrashAt(crash)])
        trainer.train(resume_from_checkpoint=resume)
        return search, factors(model, "mine")

    search, whole = run(tmp_path / "a")
    with pytest.raises(Crash):
        run(tmp_path / "b", crash=7)
    again, resumed = run(tmp_path / "b", resume=True)
    assert again.rounds == search.rounds
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_parts_of_a_merge_are_pruned_apart(tmp_path):
    model = tiny_model()
    folders = [tiny_adapter_folder(tmp_path / str(r), model, r=r, seed=r) for r in (2, 5)]
    merged = merge_adapters(tiny_model(), folders)
    search = RatioSearch(MICRO_DEV, controller=CONFIG, mask_unit="source")
    searched(tmp_path / "out", search, model=merged)
    for name, factor in factors(merged).items():
        a = "lora_A" in name
        for part in (factor[:2], factor[2:]) if a else (factor[:, :2], factor[:, 2:]):
            assert int((part == 0).sum()) == pruned_count(part.numel(), search.ratio)


def test_rows_are_measured_right_in_the_trainer(tmp_path):
    """With a learning rate of 0, the model as it is has the losses of its rows read alone."""
    config = ControllerConfig(rounds=1, rows=8, low=0.3, baseline=True)
    model = tiny_peft_model(tiny_model())
    padded = [
        {
            "input_ids": [1] * (20 - len(row["input_ids"])) + row["input_ids"],
            "labels": [-100] * (20 - len(row["input_ids"])) + row["labels"],
            "attention_mask": [0] * (20 - len(row["input_ids"])) + [1] * len(row["input_ids"]),
        }
        for row in MICRO_DEV
    ]
    expected = []
    for row in MICRO_DEV:
        logits = logits_of(model, torch.tensor([row["input_ids"]]))[0, -4:-1].double()
        picked = logits.log_softmax(-1)[range(3), row["labels"][-3:]]
        expected.append(-float(picked.mean()))
    search = RatioSearch(Dataset.from_list(padded), controller=config)
    searched(tmp_path, search, model=model, learning_rate=0.0)
    assert search.rounds[0].rows == tuple(range(8))
    assert search.rounds[0].baseline_rows == pytest.approx(expected, abs=1e-5)


def test_rows_without_labels_get_those_that_the_trainer_trains_on(tmp_path):
    """The rows may hold columns that the Trainer takes out of its own data set."""
    rows = [{"input_ids": row["input_ids"], "text": "not for the model"} for row in MICRO_DEV]
    collate = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    config = ControllerConfig(rounds=1, rows=8, low=0.3, baseline=True)
    search = RatioSearch(rows, controller=config)
    trainer = trainer_of(tmp_path, search, tiny_peft_model(tiny_model()), learning_rate=0.0)
    trainer.train_dataset = Dataset.from_list(rows)
    trainer.data_collator = collate
    expected = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            expected.append(float(trainer.model(input_ids=ids, labels=ids).loss))
    trainer.train()
    assert search.rounds[0].baseline_rows == pytest.approx(expected, abs=1e-5)


def test_training_on_after_the_search_is_free_and_saving_still_prunes(tmp_path):
    search, trainer = searched(tmp_path / "out")
    trainer_of(tmp_path / "more", None, trainer.model).train()
    assert not any(bool((f == 0).any()) for f in factors(trainer.model).values())
    loaded = PeftModel.from_pretrained(tiny_model(), str(search.save(tmp_path / "final")))
    assert_pruned_at(loaded, search.ratio)


def test_a_training_that_stops_early_has_the_rounds_until_then(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 1

    search = RatioSearch(MICRO_DEV, controller=CONFIG)
    trainer = trainer_of(tmp_path, search, others=[Stop()])
    trainer.train()
    assert (search.verdict, search.ratio, search.rounds) == ("never-fired", 0.3, ())


def test_a_checkpoint_without_the_search_is_refused(tmp_path):
    with pytest.raises(Crash):
        trainer_of(tmp_path, None, others=[CrashAt(3)]).train()
    trainer = trainer_of(tmp_path, RatioSearch(MICRO_DEV, controller=CONFIG))
    with pytest.raises(ValueError, match="checkpoint-2' holds no state of a ratio search"):
        trainer.train(resume_from_checkpoint=True)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folder of a training that stopped after its first checkpoints."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.raises(Crash):
        trainer_of(out, RatioSearch(MICRO_DEV, controller=CONFIG), others=[CrashAt(5)]).train()
    return out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": MICRO_DEV[:7]}, "begun with other micro_dev_rows: give the same"),
        ({"importance": "magnitude"}, "begun with other importance: give"),
        ({"controller": ControllerConfig(rounds=4, rows=4, low=0.3)}, "other controller: give"),
        ({"seed": 4}, "begun with other seed: give"),
    ],
)
def test_a_search_resumes_only_as_it_was_begun(stopped, change, said):
    given = {"rows": MICRO_DEV, "controller": CONFIG} | change
    search = RatioSearch(given.pop("rows"), **given)
    with pytest.raises(ValueError, match=said):
        trainer_of(stopped, search).train(resume_from_checkpoint=True)


def test_other_weights_and_damaged_state_are_found_on_resuming(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "out")
    marked = tmp_path / "out" / "checkpoint-4"
    elsewhere = shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "checkpoint-4")
    shutil.copy(marked / "trainer_state.json", elsewhere)
    trainer = trainer_of(tmp_path / "out", RatioSearch(MICRO_DEV, controller=CONFIG))
    with pytest.raises(ValueError, match="resumed from other weights than those in"):
        trainer.train(resume_from_checkpoint=str(elsewhere))
    os.truncate(marked / "grasp.safetensors", 100)
    trainer = trainer_of(tmp_path / "out", RatioSearch(MICRO_DEV, controller=CONFIG))
    with pytest.raises(ValueError, match="checkpoint-4' is damaged \\('grasp.safetensors'"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"micro_dev_rows": []}, "micro_dev_rows is empty"),
        ({"micro_dev_rows": {"train": MICRO_DEV}}, "of a DatasetDict give one split"),
        ({"micro_dev_rows": "rows.jsonl"}, "micro_dev_rows is a str, but must be a list"),
        ({"micro_dev_rows": 3}, "micro_dev_rows is a int, but must be a list"),
        ({"micro_dev_rows": ["a text"]}, "holds 'a text'; a row must be a mapping"),
        ({"importance": "size"}, "importance is 'size'; choose one of activation, magnitude"),
        ({"mask_unit": "layer"}, "mask_unit is 'layer'; choose one of merged, source"),
        ({"controller": ControllerConfig(reward="chrf")}, "controller.reward is 'chrf'"),
    ],
)
def test_arguments_are_checked_at_once(given, said):
    rows = given.pop("micro_dev_rows", MICRO_DEV)
    with pytest.raises(ValueError, match="choose|micro_dev_rows|objective") as told:
        RatioSearch(rows, **given)
    assert said in str(told.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"world_size": 2}, "single process"),
        ({"fsdp": True}, "FSDP, DeepSpeed and several processes are not supported"),
        ({"deepspeed": "zero3.json"}, "FSDP, DeepSpeed and several processes are not supported"),
        ({"trial": True}, "does not run within trainer.hyperparameter_search"),
        ({"max_steps": 1}, "has 1 optimizer steps, too few for one round"),
    ],
)
def test_trainings_that_the_search_cannot_follow_are_refused(settings, said):
    plain = {"world_size": 1, "fsdp": None, "deepspeed": None, "trial": False, "max_steps": 9}
    values = SimpleNamespace(device=torch.device("cpu"), **(plain | settings))
    state = SimpleNamespace(
        is_hyper_param_search=values.trial, max_steps=values.max_steps, global_step=0
    )
    with pytest.raises(ValueError, match=said):
        RatioSearch(MICRO_DEV).on_train_begin(values, state, None, model=None)


def test_what_comes_before_and_after_is_told(tmp_path):
    search = RatioSearch(MICRO_DEV)
    for look in (lambda: search.ratio, lambda: search.verdict, lambda: search.save(tmp_path / "x")):
        with pytest.raises(ValueError, match="no training with this search has ended"):
            look()
    assert search.rounds == ()
    with pytest.raises(ValueError, match="added after the training began"):
        search.on_step_end(None, None, None)


def test_an_objective_may_read_rows_of_any_kind(tmp_path):
    seen: list[str] = []

    def length(model, rows):
        seen.extend(rows)
        return [len(row) for row in rows]

    search = RatioSearch(
        ["a", "bb", "ccc"], importance="magnitude", controller=CONFIG, objective=length
    )
    searched(tmp_path, search)
    assert set(seen) == {"a", "bb", "ccc"}
    assert search.rounds[0].losses == (2.0, 2.0, 2.0)


def test_an_objective_must_return_a_number_for_each_row(tmp_path):
    search = RatioSearch(MICRO_DEV, controller=CONFIG, objective=lambda _model, _rows: [1.0])
    with pytest.raises(ValueError, match="returned 1 values for 4 rows"):
        searched(tmp_path, search)


def test_activation_needs_tokens_to_read(tmp_path):
    search = RatioSearch(["a"], objective=lambda _model, rows: [0.0 for _ in rows])
    with pytest.raises(ValueError, match="set importance='magnitude'"):
        searched(tmp_path, search)


def test_the_state_of_the_search_in_a_checkpoint_is_the_controllers(whole):
    stored = json.loads((whole.out / "checkpoint-12" / "grasp.json").read_text())
    controller = whole.search._searcher.controller
    assert stored["search"]["controller"] == state_to_json(controller)
    assert {record.rows for record in controller.records} != {tuple(range(4))}
    assert token_row(MICRO_DEV[0], 0, tiny_model(), None).group == "0"


class Noted(TrainerCallback):
    """Keeps what trackers are given."""

    def __init__(self):
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append({"step": state.global_step} | logs)


def test_the_numbers_of_every_round_reach_the_trackers_of_the_trainer(tmp_path):
    plain, before = searched(tmp_path / "a")
    search, noted = RatioSearch(MICRO_DEV, controller=CONFIG), Noted()
    trainer = trainer_of(tmp_path / "b", search, others=[noted])
    search.log_to(trainer.log)
    trainer.train()
    told = [one for one in noted.logs if "grasp/ratio" in one]
    assert [one["step"] for one in told] == [record.step for record in search.rounds]
    assert [one["grasp/ratio"] for one in told] == [one.mask_ratio for one in search.rounds]
    assert all(-10 < one["grasp/reward"] < 10 for one in told)
    assert search.rounds == plain.rounds
    losses = [
        [one["loss"] for one in each.state.log_history if "loss" in one]
        for each in (before, trainer)
    ]
    assert losses[0] == losses[1]
