"""The ratio search in `trl.SFTTrainer`, which tokenises rows and pads on the right by itself."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from grasp_lora.core.controller.settings import ControllerConfig
from grasp_lora.core.pruning.masks import pruned_count
from grasp_lora.training.ratio_search import RatioSearch
from helpers import tiny_model, tiny_peft_model, tiny_tokenizer

trl = pytest.importorskip("trl", reason="trl is not installed (pip install trl)")

# trl warns of its own ways, which its users cannot change.
pytestmark = pytest.mark.filterwarnings("ignore")
CONFIG = ControllerConfig(rounds=3, rows=4, low=0.3, max_step=0.3)


class Crash(RuntimeError):
    pass


class CrashAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Crash


def raw(count: int, name: str) -> Dataset:
    return Dataset.from_list(
        [{"prompt": f"{name} {i} is", "completion": f" {'x' * (i % 5)}{i}"} for i in range(count)]
    )


def trainer_of(out, crash_at=None, **settings):
    args = trl.SFTConfig(
        str(out),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=4,
        learning_rate=0.02,
        save_steps=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    return trl.SFTTrainer(
        tiny_peft_model(tiny_model(), lora_dropout=0.1),
        args,
        train_dataset=raw(10, "train"),
        eval_dataset=raw(6, "probe"),
        processing_class=tiny_tokenizer(),
        callbacks=[CrashAt(crash_at)],
    )


def searched(trainer, resume=None) -> RatioSearch:
    search = RatioSearch(trainer.eval_dataset, controller=CONFIG)
    trainer.add_callback(search)
    trainer.train(resume_from_checkpoint=resume)
    return search


def trained(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_killed_and_resumed_search_ends_as_a_whole_one(tmp_path):
    whole = trainer_of(tmp_path / "a")
    search = searched(whole)
    assert len(search.rounds) == 3
    for factor in trained(whole).values():
        assert int((factor == 0).sum()) == pruned_count(factor.numel(), search.ratio)
    with pytest.raises(Crash):
        searched(trainer_of(tmp_path / "b", crash_at=7))
    resumed = trainer_of(tmp_path / "b")
    again = searched(resumed, resume=True)
    assert again.rounds == search.rounds
    one, other = trained(whole), trained(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_rows_have_the_losses_that_the_trainer_evaluates(tmp_path):
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=1)
    config = ControllerConfig(rounds=1, rows=6, low=0.3, baseline=True)
    expected = trainer.evaluate()["eval_loss"]
    search = RatioSearch(trainer.eval_dataset, controller=config)
    trainer.add_callback(search)
    trainer.args.learning_rate = 0.0
    trainer.train()
    assert search.rounds[0].baseline == pytest.approx(expected, abs=1e-4)


def test_rows_that_the_trainer_did_not_tokenise_are_refused_with_the_way_out(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.add_callback(RatioSearch(raw(6, "probe"), controller=CONFIG))
    with pytest.raises(ValueError, match=r"no input_ids: .* RatioSearch\(trainer.eval_dataset\)"):
        trainer.train()


def test_packed_rows_are_refused(tmp_path):
    trainer = trainer_of(tmp_path, packing=True, max_length=64)
    with pytest.raises(ValueError, match="do not pack"):
        searched(trainer)
