"""Configuration: every fault at once, presets beneath, overrides on top."""

import dataclasses
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from grasp_lora.config.faults import OLD_KEYS
from grasp_lora.config.run_config import (
    ConfigError,
    RunConfig,
    load_config,
    make_config,
    paper_settings,
)
from grasp_lora.config.sections import Training, TrainingName
from grasp_lora.core import CONTROLLER_PRESETS, ControllerConfig

MINIMAL: dict[str, Any] = {
    "model": "smollm2",
    "data": {"source": {"language": "en"}, "target": {"language": "es"}},
}


def written(folder: Path, **sections: Any) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({**MINIMAL, **sections}), encoding="utf-8")
    return path


TRAININGS = get_args(TrainingName)


def epochs_of(config: RunConfig) -> tuple[int, ...]:
    return tuple(config.training(name).epochs for name in TRAININGS)


def patience_of(config: RunConfig) -> tuple[int | None, ...]:
    return tuple(config.training(name).patience for name in TRAININGS)


def faults_of(path: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.faults


def test_defaults_are_the_documented_ones(tmp_path):
    config = load_config(written(tmp_path))
    assert config.model.name == "smollm2"
    assert config.controller == ControllerConfig()
    assert (config.merge.kind, config.importance, config.mask_unit) == (
        "cat",
        "activation",
        "source",
    )
    assert epochs_of(config) == (3, 3, 10, 10)
    assert patience_of(config) == (None, None, None, 3)
    assert (config.lora.r, config.lora.alpha, config.lora.target_modules) == (
        8,
        32,
        ("q_proj", "v_proj"),
    )


def test_a_section_given_in_part_keeps_its_own_defaults(tmp_path):
    train = {"source": {"batch_size": 8}, "finetune": {"epochs": 2}}
    config = load_config(written(tmp_path, train=train))
    source, finetune = config.training("source"), config.training("finetune")
    assert (source.epochs, source.batch_size) == (3, 8)
    assert (finetune.epochs, finetune.patience, finetune.batch_size) == (2, 3, 4)


@pytest.mark.parametrize(
    ("train", "epochs"),
    [
        ({}, (3, 3, 10, 10)),
        ({"epochs": 7}, (7, 7, 7, 7)),
        ({"search": {"epochs": 6}}, (3, 3, 6, 10)),
        ({"epochs": 7, "search": {"epochs": 6}, "source": {"batch_size": 2}}, (7, 7, 6, 7)),
        ({"epochs": 10, "target": {"epochs": 1}}, (10, 1, 10, 10)),
    ],
)
def test_a_trainings_own_value_goes_before_the_shared_one_and_that_before_the_default(
    tmp_path, train, epochs
):
    config = load_config(written(tmp_path, train=train))
    assert epochs_of(config) == epochs
    assert {config.training(name).lr_decay for name in TRAININGS} == {0.85}


def test_every_value_can_be_shared_and_can_differ_for_one_training(tmp_path):
    shared = {
        "epochs": 7,
        "learning_rate": 0.5,
        "weight_decay": 0.1,
        "lr_decay": 0.5,
        "batch_size": 7,
        "accumulation": 2,
        "max_steps": 70,
        "save_every": 3,
        "max_grad_norm": 0.5,
        "order": "by-length",
        "patience": 4,
    }
    assert set(shared) == set(Training.model_fields)
    for key, value in shared.items():
        config = load_config(written(tmp_path, train={key: value}))
        found = [getattr(config.training(name), key) for name in TRAININGS]
        assert found == [None if (name, key) == ("search", "patience") else value
                         for name in TRAININGS]  # fmt: skip
        for name in TRAININGS:
            if (name, key) == ("search", "patience"):
                continue
            one = load_config(written(tmp_path, train={name: {key: value}}))
            plain = load_config(written(tmp_path))
            assert one.training(name) == plain.training(name).model_copy(update={key: value})
            assert all(one.training(n) == plain.training(n) for n in TRAININGS if n != name)


@pytest.mark.parametrize(
    ("train", "patience"),
    [
        ({"patience": 2}, (2, 2, None, 2)),
        ({"patience": None}, (None, None, None, None)),
        ({"finetune": {"patience": None}}, (None, None, None, None)),
        ({"patience": 2, "finetune": {"patience": None}}, (2, 2, None, None)),
        ({"patience": None, "source": {"patience": 1}, "search": {"patience": None}},
         (1, None, None, None)),
    ],
)  # fmt: skip
def test_patience_of_none_is_a_value_and_a_search_has_no_other(tmp_path, train, patience):
    config = load_config(written(tmp_path, train=train))
    assert patience_of(config) == patience
    assert patience_of(RunConfig(**config.to_dict())) == patience


def test_where_a_value_is_written_makes_no_other_run(tmp_path):
    shared = load_config(written(tmp_path, train={"epochs": 4}))
    apart = load_config(written(tmp_path, train={name: {"epochs": 4} for name in TRAININGS}))
    assert shared.config_hash() == apart.config_hash()
    assert shared.config_hash() != load_config(written(tmp_path)).config_hash()


def test_one_value_of_one_training_can_be_changed(tmp_path):
    config = load_config(written(tmp_path, train={"epochs": 4}))
    changed = config.with_training("search", epochs=5)
    assert epochs_of(changed) == (4, 4, 5, 4)
    assert epochs_of(config) == (4, 4, 4, 4)


def test_paper_preset_lies_beneath_the_settings_given(tmp_path):
    train = {"finetune": {"accumulation": 2}}
    config = load_config(written(tmp_path, preset="paper", train=train))
    assert config.controller == ControllerConfig(preset="paper")
    assert (config.merge.kind, config.merge.weights) == ("linear", "unscaled")
    search, finetune = config.training("search"), config.training("finetune")
    assert (search.batch_size, search.accumulation) == (1, 1)
    assert (finetune.batch_size, finetune.accumulation) == (1, 2)
    assert config.finetune.mask_schedule == "every-step"
    published = {
        "epochs": 10,
        "batch_size": 1,
        "learning_rate": 1e-4,
        "weight_decay": 0.0,
        "lr_decay": 0.85,
    }
    for name in TRAININGS:
        assert published.items() <= config.training(name).model_dump().items()
    assert patience_of(config) == (3, 3, None, 3)
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (8, 32, 0.05)
    assert config.lora.target_modules == ("q_proj", "v_proj")
    assert config.protocol == "paper"
    assert load_config(written(tmp_path)).protocol == "official"
    plain = load_config(written(tmp_path, preset="paper"))
    assert plain.training("finetune").accumulation == 8


def test_the_published_file_and_the_controllers_paper_preset_agree():
    controller = paper_settings()["controller"]
    assert dict(CONTROLLER_PRESETS["paper"]).items() <= controller.items()
    assert ControllerConfig(**controller) == ControllerConfig(preset="paper")


@pytest.mark.parametrize(
    ("sections", "epochs"),
    [
        ({"train": {"epochs": 4}}, (4, 4, 4, 4)),
        ({"train": {"source": {"epochs": 4}}}, (4, 10, 10, 10)),
        ({"train": {"epochs": 4, "target": {"epochs": 5}}}, (4, 5, 4, 4)),
    ],
)
def test_a_users_shared_value_goes_before_the_published_one_of_a_training(
    tmp_path, sections, epochs
):
    config = load_config(written(tmp_path, preset="paper", **sections))
    assert epochs_of(config) == epochs
    assert {config.training(name).batch_size for name in TRAININGS} == {1}
    assert RunConfig(**config.to_dict()) == config


@pytest.mark.parametrize("schedule", [{"rounds": 4}, {"interval": 5}])
def test_a_users_schedule_of_rounds_replaces_the_published_one(tmp_path, schedule):
    config = load_config(written(tmp_path, preset="paper", controller=schedule))
    assert config.controller == ControllerConfig(preset="paper", **schedule)


def test_another_controller_goes_with_the_published_rest(tmp_path):
    controller = {"preset": "standard", "rows": 8}
    config = load_config(written(tmp_path, preset="paper", controller=controller))
    assert config.controller == ControllerConfig(rows=8)
    assert config.merge.kind == "linear"
    other = load_config(written(tmp_path, controller={"preset": "paper"}))
    assert other.controller == ControllerConfig(preset="paper")
    assert other.merge.kind == "cat"


@pytest.mark.parametrize(
    ("sections", "changed"),
    [
        ({}, []),
        ({"preset": "paper"}, []),
        ({"preset": "paper", "output": "x", "seed": 3, "evaluate": {"beams": 2}}, []),
        ({"preset": "paper", "train": {"learning_rate": 1e-4}}, []),
        ({"preset": "paper", "merge": {"kind": "cat"}}, ["merge.kind"]),
        ({"preset": "paper", "train": {"search": {"epochs": 3}}}, ["train.search.epochs"]),
        ({"preset": "paper", "controller": {"rows": 8}}, ["controller.rows"]),
        (
            {"preset": "paper", "finetune": {"mode": "continue"}},
            ["finetune.mode", "train.finetune.epochs", "train.search.epochs"],
        ),
        ({"structure": "rank", "lora": {"r": 4}}, ["lora.r", "structure"]),
        ({"importance": "magnitude", "scope": "layer"}, ["importance", "scope"]),
    ],
)
def test_what_differs_from_the_preset_is_known_setting_by_setting(tmp_path, sections, changed):
    config = load_config(written(tmp_path, **sections))
    assert config.changed_from_preset() == changed
    assert RunConfig(**config.to_dict()).changed_from_preset() == changed


@pytest.mark.parametrize(
    ("written_as", "fault"),
    [
        ("structure: 2:4", 'YAML reads 2:4 as a number; quote it: "2:4"'),
        ("structure: '3:4'", "got '3:4'; give entries, rank, 2:4 or 4:8"),
        (
            "scope: policy\ncontroller: {preset: paper}",
            "scope: 'policy' is learned by the standard controller, but controller.preset is paper",
        ),
        (
            "scope: policy\ncontroller: {candidates: 2}",
            "scope: 'policy' compares 3 candidates a round, but controller.candidates is 2",
        ),
        (
            "structure: '2:4'\nscope: layer",
            "scope: 'layer' gives groups different ratios, but structure '2:4' knows only one",
        ),
        (
            "structure: '2:4'\ncontroller: {high: 0.2}",
            "structure '2:4' prunes nothing or 0.5, and from 0.0 to 0.2 only 0.0 is near",
        ),
    ],
)
def test_settings_that_leave_nothing_to_choose_are_refused(tmp_path, written_as, fault):
    path = written(tmp_path)
    path.write_text(f"{path.read_text()}\n{written_as}\n")
    (found,) = faults_of(path)
    assert fault in found


def test_the_paper_controller_alone_is_not_the_published_recipe(tmp_path):
    alone = load_config(written(tmp_path, controller={"preset": "paper"}))
    assert alone.preset == "standard"
    assert {"controller.preset", "controller.lr"} <= set(alone.changed_from_preset())
    assert not any(key.startswith("merge") for key in alone.changed_from_preset())


@pytest.mark.parametrize(
    ("sections", "overrides", "epochs"),
    [
        ({}, [], (10, 10)),
        ({"finetune": {"mode": "restart"}}, [], (10, 10)),
        ({"finetune": {"mode": "continue"}}, [], (5, 5)),
        ({}, ["finetune.mode=continue"], (5, 5)),
        ({"preset": "paper", "finetune": {"mode": "continue"}}, [], (5, 5)),
        (
            {"finetune": {"mode": "continue"}, "train": {"finetune": {"epochs": 3}}},
            [],
            (5, 3),
        ),
        ({"train": {"search": {"epochs": 8}}, "finetune": {"mode": "continue"}}, [], (8, 5)),
    ],
)
def test_going_on_from_the_search_halves_both_runs_unless_told(
    tmp_path, sections, overrides, epochs
):
    config = load_config(written(tmp_path, **sections), overrides)
    assert epochs_of(config)[2:] == epochs
    assert config.training("finetune").patience == 3
    assert RunConfig(**config.to_dict()) == config


def test_a_mode_that_is_none_is_refused_with_the_choices(tmp_path):
    (fault,) = faults_of(written(tmp_path, finetune={"mode": ["continue"]}))
    assert "finetune.mode" in fault
    assert "restart" in fault


@pytest.mark.parametrize("preset", ["standard", "paper"])
def test_to_dict_gives_back_the_same_configuration(tmp_path, preset):
    config = load_config(
        written(tmp_path, preset=preset, merge={"kind": "cat", "weights": [0.3, -0.7]})
    )
    again = RunConfig.model_validate(config.to_dict())
    assert again == config
    assert again.config_hash() == config.config_hash()


def test_hash_ignores_the_folder_and_sees_the_seed(tmp_path):
    path = written(tmp_path)
    base = load_config(path).config_hash()
    assert load_config(path, ["output=elsewhere"]).config_hash() == base
    assert load_config(path, ["seed=43"]).config_hash() != base


def test_all_faults_are_reported_together_with_key_value_and_near_miss(tmp_path):
    faults = faults_of(
        written(
            tmp_path,
            seed=-1,
            train={"epochs": 0, "finetune": {"epoks": 3}},
            finetune={"mask_schedule": "never"},
            merge={"weights": [1.0]},
            controller={"hihg": 0.5, "low": "x"},
            learning_rate=1e-3,
        ),
        "broken",
    )
    by_key = {fault.split(":")[0]: fault for fault in faults}
    assert "key=value" in by_key["--set 'broken'"]
    assert "-1" in by_key["seed"]
    assert "did you mean train.finetune.epochs?" in by_key["train.finetune.epoks"]
    assert "got 0" in by_key["train.epochs"]
    assert "'never'" in by_key["finetune.mask_schedule"]
    assert "once" in by_key["finetune.mask_schedule"]
    assert "1 entries" in by_key["merge"]
    assert "did you mean controller.high?" in by_key["controller.hihg"]
    assert "'x'" in by_key["controller.low"]
    assert "train.learning_rate" in by_key["learning_rate"]
    assert len(faults) == 9


def test_controller_rules_reach_the_user(tmp_path):
    (fault,) = faults_of(written(tmp_path, controller={"low": 0.5, "high": 0.4}))
    assert fault.startswith("controller:")
    assert "low=0.5" in fault


def test_unknown_part_of_the_rows_is_named_once(tmp_path):
    data = {**MINIMAL["data"], "target": {"language": "es", "rows": {"microdev": 16}}}
    faults = faults_of(written(tmp_path, data=data))
    assert faults == (
        "data.target.rows.microdev: unknown key; did you mean data.target.rows.micro_dev?",
    )


def test_a_key_with_a_dot_is_said_to_be_one_key(tmp_path):
    faults = faults_of(written(tmp_path, **{"data.tests": {}}))
    assert faults == (
        "data.tests: YAML reads this as one key; write data: and, indented below it, tests:",
    )


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"merge": {"weights": [0, 0]}}, "all 0"),
        ({"merge": {"rank": 4}}, "rank 4 has no effect"),
        ({"merge": {"kind": "svd"}}, "mask_unit: 'source'"),
        ({"train": {"search": {"patience": 2}}}, "search.patience 2 has no effect"),
        ({"train": {"search": {"epochs": None}}}, "train.search.epochs: got None"),
        ({"train": {"learn": {"epochs": 2}}}, "train.learn: unknown key"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate"),
        ({"train": {"max_grad_norm": float("inf")}}, "train.max_grad_norm"),
        ({"finetune": {"mask_schedule": 0}}, "finetune.mask_schedule"),
        ({"model": {"dtype": "int8"}}, "model.name: required"),
        ({"data": {"target": {"language": "es"}}}, "data.source: not given"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, section, said):
    assert any(said in fault for fault in faults_of(written(tmp_path, **section)))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"files": "rows.jsonl", "rows": {"train": 9, "dev": 9}}, "rows.micro_dev: required"),
        ({"files": "rows.jsonl", "rows": {"test": 9, "dev": 2}}, "rows.train: required"),
        ({"rows": {"train": 9, "dev": 9, "micro_dev": 0}}, "rows.micro_dev: 0 rows"),
        ({"files": {"train": "rows.jsonl"}}, "files.dev: required"),
        ({"files": {"train": "rows.jsonl"}, "rows": {"train": 1}}, "remove rows"),
    ],
)
def test_rows_that_do_not_fit_their_files_are_refused(tmp_path, monkeypatch, target, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    data = {**MINIMAL["data"], "target": {"language": "es", **target}}
    faults = faults_of(written(tmp_path, data=data, recipe="grasp"))
    assert any(said in fault for fault in faults)


@pytest.mark.parametrize("judges", [{}, {"dev": 2}, {"micro_dev": 2}, {"dev": 0}])
def test_a_choice_needs_no_part_that_judges_and_the_published_recipe_does(tmp_path, judges):
    data = {**MINIMAL["data"], "target": {"language": "es", "rows": {"train": 9, **judges}}}
    config = load_config(written(tmp_path, data=data))
    assert config.faults() == []
    found = {fault.split(":")[0].rpartition(".")[2] for fault in config.held_faults()}
    assert found == {"dev", "micro_dev"} - {name for name, count in judges.items() if count}
    assert faults_of(written(tmp_path, data=data, recipe="grasp")) == tuple(config.held_faults())


@pytest.mark.parametrize("kind", ["layer-swap", "ties-delta"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"weights": [0.5, 0.5]}, "merge.weights: [0.5, 0.5] has no effect on merge.kind '{}'"),
        ({"weights": "auto"}, "merge.weights: 'auto' has no effect on merge.kind '{}'"),
        ({"when": "after"}, "merge.when: 'after' chooses weights by probes, but merge.kind '{}'"),
    ],
)
def test_a_merge_without_weights_is_given_none(tmp_path, kind, changes, said):
    own = {"mask_unit": "merged", "recipe": "grasp"}
    assert load_config(written(tmp_path, merge={"kind": kind}, **own)).faults() == []
    (fault,) = faults_of(written(tmp_path, merge={"kind": kind, **changes}, **own))
    assert fault.startswith(said.format(kind))


def test_a_merge_that_mixes_its_sources_has_no_masks_for_each(tmp_path):
    (fault,) = faults_of(written(tmp_path, merge={"kind": "ties-delta"}, recipe="grasp"))
    assert fault.startswith("mask_unit: 'source' has no meaning for merge.kind 'ties-delta'")
    assert load_config(written(tmp_path, merge={"kind": "layer-swap"}, recipe="grasp"))


def test_a_choice_refuses_the_settings_that_it_makes_itself(tmp_path):
    sections = {"merge": {"when": "after", "kind": "linear"}, "controller": {"rounds": 3}}
    sections["finetune"] = {"mode": "continue", "rows": "labelled", "mask_schedule": 2}
    config = load_config(written(tmp_path, **sections, mask_unit="merged"))
    assert config.faults() == [], "comparisons and single stages use them"
    found = config.recipe_faults()
    keys = ["merge.kind", "merge.when", "mask_unit", "controller"]
    keys += ["finetune.mode", "finetune.rows", "finetune.mask_schedule"]
    assert found == [
        f"recipe: auto chooses {key} itself; leave it out, or set recipe: grasp" for key in keys
    ]
    assert load_config(written(tmp_path, **sections, recipe="grasp")).recipe_faults() == []
    plain = {"merge": {"when": "before"}, "controller": {"preset": "standard"}}
    assert load_config(written(tmp_path, **plain, importance="magnitude")).recipe_faults() == []


def test_the_published_settings_have_the_published_recipe(tmp_path):
    assert load_config(written(tmp_path, preset="paper")).recipe_faults() == []
    config = load_config(written(tmp_path, preset="paper", recipe="auto"))
    (fault,) = config.recipe_faults()
    assert fault.startswith("preset: paper is the published recipe, but recipe is auto")


@pytest.mark.parametrize("given", [{"budget": 3}, {"prefer": "simple"}])
@pytest.mark.parametrize("fixed", [{"recipe": "grasp"}, {"preset": "paper"}])
def test_nothing_is_chosen_by_a_budget_with_the_published_recipe(tmp_path, given, fixed):
    (name,) = given
    (fault,) = load_config(written(tmp_path, **given, **fixed)).recipe_faults()
    assert fault.startswith(f"{name}: recipe: grasp chooses nothing within a budget")


def test_missing_files_are_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.jsonl").touch()
    files = {"train": "here.jsonl", "dev": "here.jsonl", "micro_dev": "gone.jsonl"}
    data = {"target": {"language": "ar", "files": files}}
    faults = faults_of(written(tmp_path, data=data, adapters={"source": "nowhere"}))
    assert [fault.split(":")[0] for fault in faults] == [
        "adapters.source",
        "data.target.files.micro_dev",
    ]


def test_paths_below_the_home_folder_are_written_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "adapter").mkdir()
    config = load_config(
        written(
            tmp_path,
            model="~/base",
            output="~/run",
            adapters={"source": "~/adapter"},
            data={
                "target": {"language": "ar", "files": {"train": "~/rows.jsonl"}},
                "tests": {"news": {"language": "ar", "files": "~/rows.jsonl"}},
            },
        ),
        training=False,
    )
    assert (config.model.name, config.output) == (str(tmp_path / "base"), tmp_path / "run")
    assert config.adapters.source == tmp_path / "adapter"
    assert config.data.target.files == {"train": tmp_path / "rows.jsonl"}
    assert config.data.tests["news"].files == tmp_path / "rows.jsonl"


def test_a_file_is_a_path_and_builtin_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").touch()
    labelled = {"language": "es", "files": "rows.jsonl"}
    config = load_config(written(tmp_path, data={"source": {"language": "en"}, "target": labelled}))
    assert config.data.target.files == Path("rows.jsonl")
    assert config.data.source is not None
    assert config.data.source.files == "builtin"


def test_overrides_apply_in_order_and_parse_as_yaml(tmp_path):
    config = load_config(
        written(tmp_path),
        [
            "model.dtype=float32",
            "merge.weights=[0.25, 0.75]",
            "train.search.learning_rate=3e-4",
            "train.search.epochs=1",
            "train.search.epochs=2",
            "controller.preset=paper",
            "finetune.mask_schedule=5",
            "model.revision=null",
        ],
    )
    assert (config.model.name, config.model.dtype) == ("smollm2", "float32")
    assert config.merge.weights == (0.25, 0.75)
    search = config.training("search")
    assert (search.learning_rate, search.epochs) == (3e-4, 2)
    assert config.controller.preset == "paper"
    assert config.finetune.mask_schedule == 5


OLD = {
    "search.epochs": "train.search.epochs",
    "search.patience": "all its epochs",
    "finetune.learning_rate": "train.finetune.learning_rate",
    "finetune.patience": "train.finetune.patience",
    "finetune.importance": "importance",
    "controller.commit": "bounded ratio",
    "controller.refresh_importance": "every round",
    "controller.start": "controller.preset",
    "controller.sigma": "controller.preset",
    "model.gguf_file": "model.name",
    "lora.use_rslora": "lora.alpha",
    "data.protocol": "preset: paper",
    "data.source.labels": "divided automatically",
    "data.target.labels": "divided automatically",
    "evaluate.bertscore_layer": "bert-score lists",
    "evaluate.bertscore_rescale": "--bertscore-rescale",
    "evaluate.bertscore_max_length": "512",
}


@pytest.mark.parametrize("key", sorted(OLD_KEYS))
def test_a_key_of_an_earlier_version_is_refused_with_what_replaces_it(tmp_path, key):
    (fault,) = faults_of(written(tmp_path), f"{key}=1")
    assert fault == f"{key}: removed; {OLD_KEYS[key]}"
    assert OLD.get(key, f"train.{key}") in fault


def test_keys_of_an_earlier_version_are_refused_together_wherever_they_stand(tmp_path):
    data = {**MINIMAL["data"], "target": {"language": "es", "labels": "auto"}}
    faults = faults_of(
        written(
            tmp_path,
            data=data,
            search={"epochs": 3, "epoks": 3},
            finetune={"epochs": 3, "mode": "never"},
            controller={"commit": "candidate", "start": 0.2},
        ),
        "model.gguf_file=a.gguf",
    )
    assert {fault.split(":")[0] for fault in faults} == {
        "data.target.labels",
        "search.epochs",
        "search.epoks",
        "finetune.epochs",
        "finetune.mode",
        "controller.commit",
        "controller.start",
        "model.gguf_file",
    }
    assert any("did you mean train.search.epochs?" in fault for fault in faults)
    assert faults_of(written(tmp_path, search=3)) == ("search: removed; write train.search",)


def test_a_key_written_twice_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: a\nseed: 1\nmodel: b\n", encoding="utf-8")
    (fault,) = faults_of(path)
    assert "line 3" in fault
    assert "'model' is given twice" in fault


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "model: [", "just text"])
def test_a_file_that_is_no_block_of_settings_is_refused(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    assert len(faults_of(path)) == 1


def test_a_missing_file_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="give the path of a YAML file"):
        load_config(tmp_path / "none.yaml")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8-sig")
    assert load_config(path).model.name == "smollm2"


def test_configurations_are_immutable(tmp_path):
    config = load_config(written(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.controller.low = 0.3  # type: ignore[misc]


@pytest.mark.parametrize("name", ["two-adapters", "paper"])
def test_shipped_configurations_lack_only_the_users_files(name):
    path = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    assert path.read_text(encoding="utf-8").startswith(f"# grasp-lora run configs/{name}.yaml")
    assert all("does not exist" in fault for fault in faults_of(path))


def test_the_demo_configuration_is_complete():
    path = Path(__file__).parents[2] / "src" / "grasp_lora" / "config" / "demo.yaml"
    assert path.read_text(encoding="utf-8").startswith("# grasp-lora demo")
    assert load_config(path).data.target.files == "builtin"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 010", "seed: YAML reads 010 as 8, in base 8; write 10 or 8"),
        ("train: {epochs: 0012}", "train.epochs: YAML reads 0012 as 10, in base 8; write 12 or 10"),
        ("seed: 1:30", "seed: YAML reads 1:30 as 90, in base 60; write it without colons"),
        ("budget: 1:30.5", "budget: YAML reads 1:30.5 as 90.5, in base 60; write it"),
        ("merge: {weights: [010, 1]}", "merge.weights.0: YAML reads 010 as 8, in base 8"),
    ],
)
def test_a_number_that_yaml_reads_unlike_people_is_said(tmp_path, text, said):
    path = tmp_path / "c.yaml"
    path.write_text(f"model: none\ndata: {{target: {{language: en}}}}\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, training=False)
    assert caught.value.faults == (caught.value.faults[0],)
    assert said in caught.value.faults[0]


@pytest.mark.parametrize(("word", "number"), [("07", 7), ("0x10", 16), ("1_000", 1000), ("0", 0)])
def test_other_numbers_are_read_as_written(tmp_path, word, number):
    path = tmp_path / "c.yaml"
    path.write_text(f"model: none\ndata: {{target: {{language: en}}}}\nseed: {word}\n")
    assert load_config(path, training=False).seed == number


@pytest.mark.parametrize(
    "name", ["a\x1b[31m", "../up", "a\\b", ".hidden", "", "a\nb", "\u202egpj", "x" * 61, "\ud83d"]
)
def test_a_test_set_has_a_name_that_a_file_and_a_title_can_have(name):
    tests = {name: {"language": "es", "files": "xquad"}}
    data = {"target": {"language": "es"}, "tests": tests}
    with pytest.raises(ConfigError, match="a test set cannot be called") as caught:
        make_config({"model": "none", "data": data}, training=False)
    assert str(caught.value).isprintable() or "\n" in str(caught.value)


@pytest.mark.parametrize("name", ["news", "समाचार", "خبر\u200cها", "a b.c-d", "<script>"])
def test_test_sets_have_names_of_any_script(name):
    data = {"target": {"language": "es"}, "tests": {name: {"language": "es", "files": "xquad"}}}
    assert name in make_config({"model": "none", "data": data}, training=False).data.tests


def test_an_option_of_many_parts_is_refused():
    options = [".".join(["seed"] * 3000) + "=1"]
    with pytest.raises(ConfigError, match="not of the form key=value"):
        make_config({"model": "none", "data": {"target": {"language": "en"}}}, options)


def test_one_file_is_not_of_two_roles_unless_it_is_read_in_another_way(tmp_path):
    file, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path in (file, other):
        path.write_text("{}")
    same = str(tmp_path / "x" / ".." / "a.jsonl")
    (tmp_path / "x").mkdir()

    def faults(**sections) -> list[str]:
        target = {"language": "es", "files": str(file)}
        values = {"model": "none", "recipe": "auto", "data": {"target": target} | sections}
        return [f for f in make_config(values, training=False).faults() if "is the file of" in f]

    english = {"language": "en", "files": same}
    (said,) = faults(source=english)
    assert said.startswith("data.source.files: '")
    assert "is the file of data.target, read the same way, so its rows would be of both" in said
    assert len(faults(extra={"files": same})) == 1
    assert faults(source=english | {"columns": {"context": "en"}}) == []
    assert faults(source={"language": "en", "files": {"train": same}}) == []
    assert faults(source={"language": "en", "files": str(other)}) == []


@pytest.mark.parametrize("name", ["/home/someone/model", "~/model", "a/b/c", "owner/", "ow ner/x"])
def test_a_public_name_is_a_hub_id(name):
    with pytest.raises(ValueError, match=r"model.public_name.* is no hub id; write owner/name"):
        make_config(
            {
                "model": {"name": "smollm2", "public_name": name},
                "data": {"target": {"language": "es"}},
            }
        )


def test_rows_that_an_adapter_was_trained_on_belong_to_a_given_adapter(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "adapter").mkdir()

    def config(**adapters: Any) -> RunConfig:
        values = {"model": "none", "data": {"target": {"language": "es"}}, "adapters": adapters}
        return make_config(values, training=False)

    seen = {"target": str(tmp_path / "rows.jsonl")}
    (said,) = [f for f in config(trained_on=seen).faults() if "trained_on" in f]
    assert said.startswith("adapters.target: not given, but adapters.trained_on.target is; give")
    given = config(target=str(tmp_path / "adapter"), trained_on=seen)
    assert not [fault for fault in given.faults() if "trained_on" in fault]
    assert given.named_paths()["adapters.trained_on.target"] == tmp_path / "rows.jsonl"
    with pytest.raises(ConfigError, match=r"adapters.trained_on.source: 'no' does not exist"):
        config(trained_on={"source": "no"})
