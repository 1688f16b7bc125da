"""`finetune.rows: labelled`: rows that chose are trained on once nothing is left to choose."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.base.files import read_json
from grasp_lora.config.run_config import RunConfig
from grasp_lora.plans.run import run
from grasp_lora.plans.single import prune_adapter
from grasp_lora.workbench.context import Context, open_context
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model
from jobs import with_trainings

ROWS = {"train": 8, "dev": 4, "micro_dev": 4, "test": 4}
BATCH = 4


def settings(folder: Path, **changes) -> RunConfig:
    values = {
        "output": folder / "run",
        "model": {"name": str(folder / "base"), "dtype": "float32", "device": "cpu"},
        "data": {"max_length": 640, "target": {"language": "es", "rows": ROWS}},
        "controller": {"rounds": 2, "rows": 4},
        "search": {"epochs": 2},
        "finetune": {"epochs": 2, "rows": "labelled"},
        "evaluate": {"max_new_tokens": 2},
    }
    for name, section in changes.items():
        values[name] = values.get(name, {}) | section if isinstance(section, dict) else section
    adapters = {name: str(folder / name) for name in ("source", "target")}
    return RunConfig.model_validate(with_trainings(values) | {"adapters": adapters})


@pytest.fixture
def workplace(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    tiny_adapter_folder(tmp_path / "source", tiny_model(), r=4, seed=1)
    tiny_adapter_folder(tmp_path / "target", tiny_model(), r=2, seed=2)
    return tmp_path


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def stage(folder: Path) -> dict:
    return read_json(folder / "stage.json")


def on_train_rows(config: RunConfig) -> RunConfig:
    """Return the settings with `finetune.rows: train`."""
    finetune = config.finetune.model_copy(update={"rows": "train"})
    return config.model_copy(update={"finetune": finetune})


def trained_on_all(config: RunConfig, opened: Context, start: Path, epochs: int, out: Path) -> Path:
    """Return what plain fine-tuning makes of all labelled rows, put together here by hand."""
    parts = opened.data.parts["target"]
    rows = parts["train"] + parts["dev"] + parts["micro_dev"]
    data = replace(opened.data, parts={"source": {}, "target": {"train": rows}})
    plain = config.finetune.model_copy(update={"rows": "train", "mode": "restart"})
    config = config.model_copy(update={"finetune": plain})
    config = config.with_training("finetune", epochs=epochs, patience=None)
    return prune_adapter(config, start, 0.0, out, context=replace_data(opened, config, data))


def replace_data(opened: Context, config: RunConfig, data) -> Context:
    return Context(config, data, opened.backbone, opened.task, opened.reporter)


def kept_epochs(judged: Path) -> int:
    return stage(judged)["best"]["step"] // (ROWS["train"] // BATCH)


@pytest.mark.parametrize(("rate", "planned", "kept"), [(0.003, 3, 3), (0.2, 2, 1)])
def test_all_labelled_rows_are_trained_on_for_the_epochs_that_dev_rows_chose(
    workplace, rate, planned, kept
):
    config = settings(workplace, finetune={"learning_rate": rate, "epochs": planned})
    opened = open_context(config, quiet=True)
    out = prune_adapter(config, workplace / "source", 0.0, workplace / "out", context=opened)
    judged = workplace / "out-judged"
    plain = prune_adapter(
        on_train_rows(config), workplace / "source", 0.0, workplace / "plain", context=opened
    )
    assert tensors(judged).keys() == tensors(plain).keys()
    assert all(torch.equal(t, tensors(plain)[name]) for name, t in tensors(judged).items())
    epochs = kept_epochs(judged)
    assert epochs == kept
    wanted = trained_on_all(config, opened, workplace / "source", epochs, workplace / "wanted")
    found = tensors(out)
    assert all(torch.equal(t, found[name]) for name, t in tensors(wanted).items())
    facts = stage(out)
    assert facts["labelled"]["rows"] == 16
    assert facts["labelled"]["steps"] == stage(wanted)["steps"] == epochs * 4
    for name in ("best", "evaluations", "best_rows", "steps"):
        assert facts[name] == stage(judged)[name], "what dev rows say is of the run they judged"


def test_a_start_that_no_epoch_has_bettered_is_left_as_it_is(workplace):
    config = settings(workplace, finetune={"learning_rate": 0.3, "epochs": 1})
    out = prune_adapter(config, workplace / "source", 0.0, workplace / "out")
    assert stage(out)["best"]["step"] == 0
    assert stage(out)["labelled"]["steps"] == 0
    one, two = (read_adapter(folder).adapter for folder in (out, workplace / "source"))
    for name, module in two.items():
        torch.testing.assert_close(one[name].delta(), module.delta())


def test_the_masks_are_those_of_the_judged_run(workplace):
    config = settings(workplace, finetune={"learning_rate": 0.003})
    out = prune_adapter(config, workplace / "source", 0.5, workplace / "out")
    for name, tensor in tensors(workplace / "out-judged").items():
        assert torch.equal(tensor == 0, tensors(out)[name] == 0)
        assert (tensor == 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_after_a_search_they_are_cut_where_it_ended_and_trained_from_where_it_began(workplace):
    changes = {"controller": {"low": 0.4, "high": 0.6}}
    changes["finetune"] = {"mode": "continue", "learning_rate": 0.003, "epochs": 2}
    changes["search"] = {"learning_rate": 0.02}
    changes["evaluate"] = {"baselines": False}
    out = run(settings(workplace, **changes), quiet=True)
    assert stage(out / "search")["best"]["step"] > 0, "or the search ends where it began"
    judged, final = tensors(out / "shipped-judged"), tensors(out / "final")
    for name, tensor in judged.items():
        assert torch.equal(tensor == 0, final[name] == 0)
        assert 0.35 < (tensor == 0).float().mean() < 0.65
    config = settings(workplace, **changes)
    anew = prune_adapter(
        on_train_rows(config), out / "merged", stage(out / "shipped")["ratio"], out / "anew"
    )
    others = tensors(anew)
    assert any(not torch.equal(t == 0, others[name] == 0) for name, t in judged.items())


def test_masks_drawn_at_random_stay_those_that_were_drawn(workplace):
    def zeros(folder, **more):
        config = settings(workplace, finetune={"learning_rate": 0.003, **more})
        out = prune_adapter(on_train_rows(config), workplace / "source", 0.5, workplace / folder,
                          options={"random_masks": True})  # fmt: skip
        return {name: tensor == 0 for name, tensor in tensors(out).items()}

    once, again = zeros("random"), zeros("recut", mask_schedule="every-step")
    assert all(torch.equal(zero, again[name]) for name, zero in once.items())


@pytest.mark.parametrize("mode", ["restart", "continue"])
def test_a_run_begins_anew_from_the_merge_for_all_epochs_that_were_kept(workplace, mode):
    changes = {"controller": {"low": 0.0, "high": 0.3}}
    changes["finetune"] = {"mode": mode, "learning_rate": 0.003, "epochs": 2}
    changes["search"] = {"learning_rate": 0.003}
    changes["evaluate"] = {"baselines": False}
    out = run(settings(workplace, **changes), quiet=True)
    epochs = kept_epochs(out / "shipped-judged")
    if mode == "continue":
        epochs += stage(out / "search")["best"]["step"] // 2
        assert epochs > 2, "some of the epochs are the search's"
    final = stage(out / "shipped")
    assert final["labelled"]["steps"] == 4 * epochs
    # Pruned at the learned ratio or not at all, and from the merge: its learning rate is the first.
    assert final["labelled"]["log"][0]["learning_rate"] == pytest.approx(0.003)
    assert final["ratio"] == read_json(out / "ratio.json")["ratio"]
    assert "retrained on all 16 labelled target examples" in (out / "report.md").read_text()


def test_a_late_merge_takes_its_weights_from_rows_not_yet_trained_on(workplace):
    config = settings(
        workplace, merge={"when": "after"}, finetune={"learning_rate": 0.003, "epochs": 1}
    )
    out = run(config, quiet=True)
    weights = read_json(out / "weights" / "weights.json")["weights"]
    folders = {
        "merged": out / "baselines" / "source-finetuned-judged",
        "merged-labelled": out / "baselines" / "source-finetuned",
    }
    target = read_adapter(workplace / "target").adapter
    for merged, source in folders.items():
        parts = read_adapter(source).adapter
        for name, module in read_adapter(out / merged).adapter.items():
            wanted = weights[0] * parts[name].delta() + weights[1] * target[name].delta()
            torch.testing.assert_close(module.delta(), wanted, atol=1e-6, rtol=1e-5)
    assert stage(folders["merged-labelled"])["labelled"]["steps"] > 0
    final = stage(out / "shipped")
    assert final["labelled"]["steps"] == 0, "nothing is trained after a late merge"
    assert final["best_rows"] == stage(out / "shipped-judged")["best_rows"]


def test_without_dev_rows_no_epochs_can_be_chosen(workplace):
    rows = ROWS | {"dev": 0}
    config = settings(
        workplace, data={"max_length": 640, "target": {"language": "es", "rows": rows}}
    )
    with pytest.raises(ValueError, match="has no target dev rows to choose the epochs by"):
        prune_adapter(config, workplace / "source", 0.0, workplace / "out")


def test_the_end_of_a_search_is_no_place_to_begin_anew(workplace):
    changes = {"finetune": {"mode": "continue", "epochs": 1, "learning_rate": 0.003}}
    changes["search"] = {"learning_rate": 0.003}
    config = settings(workplace, evaluate={"baselines": False}, **changes)
    out = run(config, quiet=True)
    assert read_json(out / "search" / "adapter" / "merge.json")["epochs"] > 0
    with pytest.raises(ValueError, match="give the merged adapter as the start"):
        prune_adapter(config, out / "search" / "adapter", 0.1, workplace / "out")
