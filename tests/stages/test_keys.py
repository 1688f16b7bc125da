"""Keys of stages: what makes a result another one, what does not, and how that is told."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grasp_lora.base.files import jsonable, read_json, write_json
from grasp_lora.config.run_config import RunConfig, make_config
from grasp_lora.models.sources import files_content
from grasp_lora.stages.keys import Key, differences, hash_of, input_content, key_of
from grasp_lora.stages.stage import Stage
from grasp_lora.stages.table import KINDS
from grasp_lora.workbench.rows import RunData, load_run_data
from helpers import tiny_adapter_folder, tiny_model
from jobs import job, write_rows

BASE = "0123456789abcdef"
STAGES = {
    "train": Stage("a", "train", None, options={"role": "target"}),  # type: ignore[arg-type]
    "merge": Stage("b", "merge", None),  # type: ignore[arg-type]
    "search": Stage("c", "search", None),  # type: ignore[arg-type]
    "prune": Stage("d", "prune", None, options={"ratio": 0.5}),  # type: ignore[arg-type]
    "evaluate": Stage("e", "evaluate", None),  # type: ignore[arg-type]
}
"""Kind -> a stage of it; the settings are put in by `keys`."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "base").mkdir()
    write_rows(folder / "news.jsonl", range(4), prefix="n")
    return folder


@pytest.fixture(scope="module")
def data(place) -> RunData:
    return load_run_data(settings(place), lambda _line: None)


def settings(place: Path, **changes) -> RunConfig:
    return make_config(job(place, **changes))


def keys(config: RunConfig, data: RunData, base: str | None = BASE) -> dict[str, Key]:
    """Return kind -> the key of its stage, as it is read back from a file."""
    made = {kind: replace(stage, config=config) for kind, stage in STAGES.items()}
    return {
        kind: jsonable(key_of(stage, KINDS[kind], data, base, {"start": "x"}))
        for kind, stage in made.items()
    }


def changed(before: dict[str, Key], after: dict[str, Key]) -> dict[str, list[str]]:
    """Return kind -> differences, of the kinds that have some."""
    found = {kind: differences(before[kind], after[kind]) for kind in before}
    return {kind: lines for kind, lines in found.items() if lines}


def test_a_chat_template_of_adapters_changes_what_is_asked_in_it(place, data):
    chat = {"data": job(place)["data"] | {"chat": True}}
    for config, kinds in ((settings(place), set()), (settings(place, **chat), STAGES.keys())):
        made = {kind: replace(stage, config=config) for kind, stage in STAGES.items()}

        def keyed(template, made=made):
            return {k: key_of(s, KINDS[k], data, BASE, {}, template) for k, s in made.items()}

        line = ["the chat template of the adapters is another"]
        found = changed(keyed(None), keyed("a"))
        assert found == dict.fromkeys(kinds - {"merge"}, line)
        assert changed(keyed("b"), keyed("a")) == found
        assert changed(keyed("a"), keyed("a")) == {}


def test_a_setting_of_the_evaluation_leaves_what_is_trained_alone(place, data):
    before = keys(settings(place), data)
    evaluate = {"max_new_tokens": 2, "baselines": False, "beams": 4}
    after = keys(settings(place, evaluate=evaluate), data)
    assert changed(before, after) == {"evaluate": ["evaluate.beams was 1, is 4"]}


def test_answers_that_the_reward_is_made_of_count_for_the_search(place, data):
    controller = {"rounds": 3, "rows": 4, "reward": "chrf"}
    before = keys(settings(place, controller=controller), data)
    longer = settings(place, controller=controller, evaluate={"max_new_tokens": 3})
    assert list(changed(before, keys(longer, data))) == ["search", "evaluate"]


@pytest.mark.parametrize("change", [{"output": "elsewhere"}, {"report_to": ["tensorboard"]}])
def test_where_results_go_and_who_is_told_changes_no_key(place, data, change):
    assert not changed(keys(settings(place), data), keys(settings(place, **change), data))


def test_a_setting_of_one_training_changes_the_key_of_that_training_alone(place, data):
    after = keys(settings(place, search={"epochs": 3}), data)
    told = changed(keys(settings(place), data), after)
    assert told == {"search": ["train.search.epochs was 2, is 3"]}


def test_what_a_result_cannot_depend_on_is_not_in_its_key(place, data):
    before = keys(settings(place), data)
    assert "merge" not in changed(before, keys(settings(place, seed=7), data))
    untrained = replace(STAGES["prune"], options={"untrained": True, "ratio": 0.5})
    one, two = (
        key_of(replace(untrained, config=config), KINDS["prune"], data, BASE, {})
        for config in (settings(place), settings(place, finetune={"learning_rate": 0.5}))
    )
    assert not differences(one, two)


def test_differences_are_told_setting_by_setting_with_the_old_and_the_new_value(place, data):
    old = keys(settings(place), data)["prune"]
    config = settings(place, seed=7, finetune={"epochs": 5, "learning_rate": 0.0003})
    stage = replace(STAGES["prune"], config=config, options={"ratio": 0.25, "random_masks": True})
    new = key_of(stage, KINDS["prune"], data, None, {"start": "y"})
    assert differences(old, new) == [
        "the weights of the base model are others",
        f'model.name was none, is "{place / "base"}"',
        "seed was 42, is 7",
        "train.finetune.epochs was 2, is 5",
        "train.finetune.learning_rate was 0.0001, is 0.0003",
        "random_masks was none, is true",
        "ratio was 0.5, is 0.25",
        "the folder given as start has another content",
    ]


def test_a_difference_is_one_whichever_side_lacks_the_entry(place, data):
    plain = keys(settings(place), data)["prune"]
    told = copy.deepcopy(plain)
    told["options"]["untrained"] = True
    assert differences(told, plain) == ["untrained was true, is none"]
    assert differences(plain, told) == ["untrained was none, is true"]
    told["options"]["untrained"] = False
    assert not differences(told, plain), "an option that says nothing counts as absent"


def test_a_result_of_another_kind_or_format_is_named(place, data):
    found = keys(settings(place), data)
    assert differences(found["search"], found["prune"]) == [
        "it is the result of a stage search, not prune"
    ]
    older = found["prune"] | {"format": 0}
    assert differences(older, found["prune"]) == ["its format is 0, this version writes 1"]


def test_a_setting_that_is_absent_equals_its_default(place, data):
    stored = keys(settings(place), data)["prune"]
    wanted = copy.deepcopy(stored)
    assert stored["settings"].pop("structure") == "entries"
    assert not differences(stored, wanted), "a setting came in since, and is at its default"
    wanted["settings"]["structure"] = "rank"
    assert differences(stored, wanted) == ['structure was "entries", is "rank"']


def test_a_setting_that_is_gone_since_differs_unless_it_said_nothing(place, data):
    wanted = keys(settings(place), data)["prune"]
    stored = copy.deepcopy(wanted)
    stored["settings"]["old.switch"] = None
    assert not differences(stored, wanted)
    stored["settings"]["old.switch"] = 0.3
    assert differences(stored, wanted) == ["old.switch was 0.3, is none"]


def test_other_test_examples_leave_what_is_trained_alone(place, data):
    target = data.parts["target"]
    fewer = replace(data, parts=data.parts | {"target": target | {"test": target["test"][:2]}})
    before, after = (keys(settings(place), one) for one in (data, fewer))
    assert changed(before, after) == {"evaluate": ["the examples of target/test have changed"]}
    cut = replace(data, parts=data.parts | {"target": target | {"dev": target["dev"][:2]}})
    told = changed(before, keys(settings(place), cut))
    assert "evaluate" not in told
    assert told["train"] == ["the examples of target/dev have changed"]


def test_a_test_file_counts_by_its_examples_not_by_its_place(place, data):
    def evaluation(file: Path) -> Key:
        values = job(place)
        values["data"]["tests"] = {"news": {"language": "es", "files": str(file)}}
        config = make_config(values)
        return keys(config, load_run_data(config, lambda _line: None))["evaluate"]

    before = evaluation(place / "news.jsonl")
    moved = shutil.copy(place / "news.jsonl", place / "moved.jsonl")
    assert not differences(before, evaluation(Path(moved)))
    other = write_rows(place / "other.jsonl", range(5), prefix="n")
    assert differences(before, evaluation(other)) == ["the examples of tests/news have changed"]


def test_an_input_folder_counts_by_content_not_by_place(tmp_path):
    model = tiny_model()
    one = tiny_adapter_folder(tmp_path / "one", model, seed=1)
    write_json(one / "merge.json", {"kind": "cat", "sources": ["here/a", "here/b"]})
    content = input_content("start", one)
    two = shutil.copytree(one, tmp_path / "two")
    assert input_content("start", two) == content
    write_json(two / "merge.json", {"kind": "cat", "sources": ["there/a", "there/b"]})
    assert input_content("start", two) == content, "where it was merged from is a place too"
    write_json(two / "merge.json", {"kind": "linear", "sources": ["there/a", "there/b"]})
    assert input_content("start", two) != content
    shutil.rmtree(two)
    tiny_adapter_folder(two, model, seed=2)
    assert input_content("start", two) != input_content("start", one)


def test_the_rank_that_a_probe_found_counts(tmp_path):
    contents = []
    for rank in (2, 4):
        write_json(tmp_path / f"at {rank}" / "rank.json", {"rank": rank})
        contents.append(input_content("rank", tmp_path / f"at {rank}"))
    assert contents[0] != contents[1]


def test_of_a_search_that_gives_the_ratio_the_ratio_alone_counts(tmp_path):
    write_json(tmp_path / "ratio.json", {"ratio": 0.4, "verdict": "learned"})
    content = input_content("ratio", tmp_path)
    write_json(tmp_path / "ratio.json", {"ratio": 0.4, "verdict": "flat"})
    assert input_content("ratio", tmp_path) == content
    write_json(tmp_path / "ratio.json", {"ratio": 0.41, "verdict": "flat"})
    assert input_content("ratio", tmp_path) != content


def test_weights_that_differ_in_the_middle_of_a_file_are_others(tmp_path):
    """Neither the header nor an end of the file shows it, nor its size."""
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(512, 1024, generator=generator) for name in ("a", "b", "c")}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    (tmp_path / "notes.txt").write_text("no weights")
    content = files_content(tmp_path)
    (tmp_path / "notes.txt").write_text("still none")
    assert files_content(tmp_path) == content
    save_file(tensors | {"b": tensors["b"] + 0.01}, file)
    assert files_content(tmp_path) not in (content, None)
    save_file(tensors, file)
    assert files_content(tmp_path) == content
    assert load_file(file).keys() == tensors.keys()
    assert files_content(tmp_path / "nothing") is None


def test_a_stored_key_is_that_of_the_file(place, data, tmp_path):
    for kind, key in keys(settings(place), data).items():
        write_json(tmp_path / "stage.json", {"key": key})
        assert not differences(read_json(tmp_path / "stage.json")["key"], key), kind


def with_extra(place: Path, name: str = "extra.jsonl", count: int = 5, **changes) -> RunConfig:
    path = write_rows(place / name, range(count), prefix="x")
    values = job(place)
    values["data"] |= {"extra": {"files": str(path)} | changes}
    return make_config(values)


def keys_with_extra(place: Path, name: str = "extra.jsonl", count: int = 5, **changes):
    config = with_extra(place, name, count, **changes)
    return keys(config, load_run_data(config, lambda _line: None))


def test_extra_rows_change_the_keys_of_what_trains_on_target_rows(place, data):
    plain, found = keys(settings(place), data), keys_with_extra(place)
    told = [
        "data.extra.weight was none, is 1",
        "the examples of extra/train have changed",
    ]
    assert changed(plain, found) == dict.fromkeys(("train", "search", "prune"), told)
    assert not any("extra" in str(key) for key in plain.values())


def test_other_extra_rows_or_another_weight_are_told(place):
    before = keys_with_extra(place)
    trained = ("train", "search", "prune")
    assert changed(before, keys_with_extra(place, "moved.jsonl")) == {}
    told = changed(before, keys_with_extra(place, weight=2))
    assert told == dict.fromkeys(trained, ["data.extra.weight was 1, is 2"])
    told = changed(before, keys_with_extra(place, "more.jsonl", 6))
    assert told == dict.fromkeys(trained, ["the examples of extra/train have changed"])
    told = changed(before, keys_with_extra(place, prompt="{question} {context}"))
    line = 'data.extra.prompt was none, is "{question} {context}"'
    assert told == dict.fromkeys(trained, [line])


@pytest.mark.parametrize(
    "stage",
    [
        Stage("a", "train", None, options={"role": "source"}),  # type: ignore[arg-type]
        Stage("b", "search", None, options={"untrained": True}),  # type: ignore[arg-type]
        Stage("c", "prune", None, options={"untrained": True, "ratio": 0.5}),  # type: ignore[arg-type]
        Stage("d", "probe", None, options={"choice": "weights"}),  # type: ignore[arg-type]
        Stage("e", "evaluate", None, options={"labelled": True}),  # type: ignore[arg-type]
    ],
    ids=lambda stage: stage.kind,
)
def test_what_does_not_train_on_target_rows_has_the_key_it_had(place, data, stage):
    config = with_extra(place)
    more = load_run_data(config, lambda _line: None)
    one, other = (
        key_of(replace(stage, config=settings_, name=stage.name), KINDS[stage.kind], rows, BASE, {})
        for settings_, rows in ((settings(place), data), (config, more))
    )
    assert hash_of(one) == hash_of(other)
    assert not differences(one, other)


def test_folds_depend_on_which_extra_rows_are_like_theirs(place):
    config = with_extra(place)
    data = load_run_data(config, lambda _line: None)
    fold = Stage("a", "train", config, options={"role": "target", "folds": 5, "fold": 1})
    for stage, counts in ((fold, True), (replace(fold, options={"role": "target"}), False)):
        key = key_of(stage, KINDS["train"], data, BASE, {})
        assert ("data.near_duplicates" in key["settings"]) == counts


def test_joint_batches_read_the_source_rows(place, data):
    plain = replace(STAGES["prune"], config=settings(place))
    joint = replace(plain, options={"ratio": 0.5, "joint": True})
    one, other = (key_of(stage, KINDS["prune"], data, BASE, {}) for stage in (plain, joint))
    assert differences(one, other) == [
        "joint was none, is true",
        "the examples of source/train have changed",
    ]
    never = replace(plain, options={"ratio": 0.5, "joint": False})
    assert hash_of(key_of(never, KINDS["prune"], data, BASE, {})) == hash_of(one)


def test_which_gpu_of_several_is_used_does_not_matter(place, data):
    def key(device: str) -> Key:
        model = job(place)["model"] | {"device": device}
        return keys(settings(place, model=model), data)["train"]

    assert (
        differences(key("cuda:0"), key("cuda:1")) == differences(key("cuda"), key("cuda:3")) == []
    )
    assert hash_of(key("cuda:0")) == hash_of(key("cuda"))
    assert differences(key("cpu"), key("cuda:1")) == ['model.device was "cpu", is "cuda"']
