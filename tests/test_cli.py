"""The command line: arguments arrive at the functions behind it, faults arrive as one message."""

import errno
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from grasp_lora.base.files import write_json
from grasp_lora.cli import app
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model

COMMANDS = [
    *("run", "plan", "demo", "train", "merge", "search", "finetune", "precheck", "evaluate"),
    *("score", "export", "push", "cost", "report", "schema", "init", "doctor", "shrink"),
]
FUNCTIONS = {
    "plans.run": ("run",),
    "plans.single": (
        *("train_adapter", "merge_adapters", "search_ratio", "prune_adapter"),
        "shrink_adapter",
        "evaluate_adapter",
    ),
}
YAML = "model: smollm2\ndata: {source: {language: en}, target: {language: es}}\n"

Called = dict[str, Any]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    """Put functions that record their arguments in place of the real ones."""
    record: Called = {}

    def recorder(name: str) -> Callable[..., Path]:
        def function(config: Any, *args: Any, **kwargs: Any) -> Path:
            record.update(name=name, config=config, args=args, kwargs=kwargs)
            return args[-1] if args else config.output

        return function

    for module, functions in FUNCTIONS.items():
        fake = types.ModuleType(f"grasp_lora.{module}")
        for function in functions:
            setattr(fake, function, recorder(function))
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return record


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(YAML, encoding="utf-8")
    return str(path)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "grasp_lora", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_help_answers_without_loading_torch():
    start = time.perf_counter()
    done = command("--help")
    # Generous: a busy machine. Loading torch and transformers alone takes longer.
    assert time.perf_counter() - start < 5
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_help_says_what_is_read_and_written(name):
    done = invoke(name, "--help")
    assert done.exit_code == 0
    assert "Reads" in done.output
    assert "Writes" in done.output


def test_settings_output_and_seed_reach_the_configuration(called, config, tmp_path):
    out = tmp_path / "no"
    write_scores(out)
    done = invoke(
        *("run", config, "--set", "train.search.epochs=2", "--set", "model.dtype=float32"),
        *("--output", str(out), "--seed", "7", "--overwrite"),
    )
    assert done.exit_code == 0, done.output
    given = called["config"]
    assert (given.training("search").epochs, given.model.dtype, given.seed) == (2, "float32", 7)
    assert given.output == out
    assert called["kwargs"] == {"overwrite": True, "profile": False}


def test_run_and_demo_can_be_profiled(called, config, tmp_path):
    write_scores(tmp_path)
    for command in (["run", config], ["demo"]):
        done = invoke(*command, "--output", str(tmp_path), "--profile")
        assert done.exit_code == 0, done.output
        assert called["kwargs"] == {"overwrite": False, "profile": True}


def test_run_prints_the_scores_and_the_outcome(called, config, tmp_path):
    out = tmp_path / "out"
    write_scores(out)
    done = invoke("run", config, "--output", str(out))
    assert "zero-shot" in done.output
    assert "12.5" in done.output
    assert f"wrote {out}" in done.output.replace("\n", "")
    assert "ratio 0.400, verdict learned" in done.output


def test_an_output_that_looks_like_another_type_stays_a_path(called, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_scores(tmp_path / "1e3")
    assert invoke("run", config, "--output", "1e3").exit_code == 0
    assert called["config"].output == Path("1e3")


def test_demo_runs_the_packaged_configuration(called, tmp_path):
    out = tmp_path / "demo"
    write_scores(out)
    done = invoke("demo", "--output", str(out), "--set", "train.search.epochs=1")
    assert done.exit_code == 0, done.output
    assert (called["name"], called["config"].model.name) == ("run", "smollm2")
    assert called["config"].training("search").epochs == 1


@pytest.mark.parametrize(
    ("arguments", "name", "args"),
    [
        (["train", "--role", "source"], "train_adapter", ("source",)),
        (
            ["merge", "--adapter", "a", "--adapter", "b"],
            "merge_adapters",
            ([Path("a"), Path("b")],),
        ),
        (["search", "--merged", "m"], "search_ratio", (Path("m"),)),
        (["finetune", "--start", "m", "--ratio", "0.4"], "prune_adapter", (Path("m"), 0.4)),
        (["shrink", "--adapter", "m", "--budget-mb", "0.4"], "shrink_adapter", (Path("m"), 0.4)),
    ],
)
def test_each_command_calls_its_recipe(called, config, arguments, name, args):
    done = invoke(arguments[0], config, *arguments[1:], "--out", "there")
    assert done.exit_code == 0, done.output
    assert called["name"] == name
    assert called["args"] == (*args, Path("there"))
    own = {
        "finetune": {"options": {"spread": None, "untrained": False}},
        "merge": {"weights": None},
    }.get(arguments[0], {})
    assert called["kwargs"] == {"overwrite": False} | own


def test_finetune_may_prune_and_measure_only(called, config):
    options = ("--start", "m", "--ratio", "0.4", "--no-train", "--out", "there")
    done = invoke("finetune", config, *options)
    assert done.exit_code == 0, done.output
    assert called["kwargs"]["options"]["untrained"] is True


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    """A folder as an evaluation leaves it, and an adapter folder beside it."""
    score = {"value": 12.5, "low": 5.0, "high": 20.0, "n": 8, "settings": {}}
    sets = {"test": {"language": "es", "n": 8, "scores": {"exact_match": score}}}
    write_json(tmp_path / "out/scores.json", {"sets": sets})
    write_json(tmp_path / "adapter/adapter_config.json", {"base_model_name_or_path": "smollm2"})
    return tmp_path


@pytest.mark.parametrize(("given", "folder"), [("adapter", True), ("none", False)])
def test_evaluate_takes_the_test_rows_of_a_configuration(called, config, evaluated, given, folder):
    adapter = str(evaluated / given) if folder else given
    out = str(evaluated / "out")
    done = invoke("evaluate", adapter, "--config", config, "--out", out)
    assert done.exit_code == 0, done.output
    assert called["name"] == "evaluate_adapter"
    assert called["args"] == (Path(adapter) if folder else None, Path(out))
    assert "12.50" in done.output
    assert "5.00 to 20.00" in done.output


def test_evaluate_takes_files_and_the_model_the_adapter_names(called, evaluated):
    for name in ("one.jsonl", "two.jsonl"):
        (evaluated / name).touch()
    done = invoke(
        *("evaluate", str(evaluated / "adapter"), "--out", str(evaluated / "out")),
        *("--data", str(evaluated / "one.jsonl"), "--data", f"news={evaluated}/two.jsonl"),
        *("--language", "ar", "--language", "zh", "--task", "summarization"),
        *("--set", "evaluate.beams=4", "--seed", "3"),
    )
    assert done.exit_code == 0, done.output
    given = called["config"]
    assert (given.model.name, given.evaluate.beams, given.seed) == ("smollm2", 4, 3)
    assert given.data.task == "summarization"
    assert given.data.target.files == {"test": evaluated / "one.jsonl"}
    assert given.data.target.language == "ar"
    assert given.data.tests["news"].language == "zh"
    assert given.data.tests["news"].files == evaluated / "two.jsonl"


def test_evaluate_finds_an_adapter_in_a_subfolder(called, config, evaluated):
    (evaluated / "named").mkdir()
    (evaluated / "adapter").rename(evaluated / "named" / "arabic")
    options = ("--config", config, "--out", str(evaluated / "out"))
    done = invoke("evaluate", str(evaluated / "named"), *options)
    assert done.exit_code == 0, done.output
    assert called["args"][0] == evaluated / "named"
    write_json(evaluated / "named/swahili/adapter_config.json", {})
    done = invoke("evaluate", str(evaluated / "named"), *options)
    assert done.exit_code == 2
    assert "2 adapters in subfolders (arabic, swahili)" in done.output


def test_evaluate_asks_for_the_model_where_the_adapter_names_a_path_that_is_not_here(
    called, evaluated
):
    base = "/home/someone/models/x"
    write_json(evaluated / "adapter/adapter_config.json", {"base_model_name_or_path": base})
    (evaluated / "rows.jsonl").touch()
    options = ["--data", str(evaluated / "rows.jsonl"), "--language", "ar"]
    options += ["--out", str(evaluated / "out")]
    done = invoke("evaluate", str(evaluated / "adapter"), *options)
    assert done.exit_code == 2
    assert (
        f"names '{base}' as its base model, a path that is not on this machine; pass --model"
        in (" ".join(done.output.split()))
    )
    assert not called
    done = invoke("evaluate", str(evaluated / "adapter"), "--model", "smollm2", *options)
    assert done.exit_code == 0, done.output


def test_evaluate_finds_an_adapter_below_the_home_folder(called, evaluated, monkeypatch):
    monkeypatch.setenv("HOME", str(evaluated))
    (evaluated / "rows.jsonl").touch()
    (evaluated / "base").mkdir()
    options = ("--model", "~/base", "--data", "news=~/rows.jsonl", "--language", "ar")
    done = invoke("evaluate", "~/adapter", *options, "--out=~/out")
    assert done.exit_code == 0, done.output
    assert called["args"] == (evaluated / "adapter", evaluated / "out")
    assert called["config"].model.name == str(evaluated / "base")
    assert called["config"].data.tests["news"].files == evaluated / "rows.jsonl"


@pytest.mark.parametrize(
    ("command", "options", "folders"),
    [
        ("merge", ["--adapter=~/a", "--adapter=~/b"], [["a", "b"]]),
        ("search", ["--merged=~/m"], ["m"]),
        ("finetune", ["--start=~/s", "--ratio=0.5"], ["s", 0.5]),
        ("shrink", ["--adapter=~/s", "--budget-mb=0.5"], ["s", 0.5]),
    ],
)
def test_every_path_may_be_below_the_home_folder(
    called, tmp_path, monkeypatch, command, options, folders
):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(YAML)
    done = invoke(command, "~/run.yaml", *options, "--out=~/out")
    assert done.exit_code == 0, done.output

    def there(name: Any) -> Any:
        if isinstance(name, list):
            return [there(one) for one in name]
        return tmp_path / name if isinstance(name, str) else name

    assert list(called["args"]) == [*map(there, folders), tmp_path / "out"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give either --config YAML"),
        (["--config", "{yaml}", "--data", "x"], "give either --config YAML"),
        (["--config", "{yaml}", "--language", "ar"], "--language has no effect beside --config"),
        (["--data", "{file}"], "0 languages for 1 files"),
        (["--data", "{file}", "--data", "{file}", "--language", "ar"], "two files of --data"),
        (["--data", "none.jsonl", "--language", "ar"], "'none.jsonl' does not exist"),
        (["--data", "mean={file}", "--language", "ar"], "cannot be called 'mean'"),
    ],
)
def test_evaluate_says_which_options_are_missing(called, config, evaluated, options, said):
    (evaluated / "rows.jsonl").touch()
    filled = [text.format(yaml=config, file=evaluated / "rows.jsonl") for text in options]
    adapter, out = str(evaluated / "adapter"), str(evaluated / "out")
    done = invoke("evaluate", adapter, *filled, "--out", out)
    assert done.exit_code == 2
    assert said in done.output
    assert not called


def test_evaluate_refuses_a_folder_that_is_no_adapter_beside_a_configuration(called, config):
    done = invoke("evaluate", "nothing", "--config", config, "--out", "there")
    assert done.exit_code == 2
    assert "is no PEFT adapter" in done.output


def test_leakage_can_be_allowed(called, config, tmp_path):
    write_scores(tmp_path)
    assert not invoke("run", config, "--output", str(tmp_path)).exit_code
    assert called["config"].data.allow_leakage is False
    assert not invoke("run", config, "--output", str(tmp_path), "--allow-leakage").exit_code
    assert called["config"].data.allow_leakage is True


def test_merge_takes_the_adapters_of_the_configuration(called, config, tmp_path):
    for role in ("s", "t"):
        (tmp_path / role).mkdir()
    settings = [f"--set=adapters.source={tmp_path}/s", f"--set=adapters.target={tmp_path}/t"]
    assert invoke("merge", config, *settings, "--out", "there").exit_code == 0
    assert called["args"][0] == [tmp_path / "s", tmp_path / "t"]


def test_merge_without_adapters_is_refused(called, config):
    done = invoke("merge", config, "--out", "there")
    assert done.exit_code == 2
    assert "--adapter DIR" in done.output
    assert not called


def test_finetune_reads_the_ratio_of_a_search(called, config, tmp_path):
    write_json(tmp_path / "ratio.json", {"ratio": 0.35})
    ratio = str(tmp_path / "ratio.json")
    done = invoke("finetune", config, "--start", "m", "--ratio", ratio, "--out", "there")
    assert done.exit_code == 0, done.output
    assert called["args"][1] == 0.35


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        ("1.01", "no fraction in [0, 1]"),
        ("-0.1", "no fraction in [0, 1]"),
        ("nan", "no fraction in [0, 1]"),
        ("none.json", "does not exist"),
        ("{empty}", "holds no ratio"),
    ],
)
def test_ratios_that_are_none_are_refused(called, config, tmp_path, ratio, said):
    write_json(tmp_path / "empty.json", {})
    text = ratio.format(empty=tmp_path / "empty.json")
    done = invoke("finetune", config, "--start", "m", f"--ratio={text}", "--out", "there")
    assert done.exit_code == 2
    assert said in done.output
    assert not called


def test_faults_are_printed_without_a_traceback(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(YAML + "seeed: 3\n", encoding="utf-8")
    done = command("run", str(path), "--set", "train.search.epochs=0")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "did you mean seed?" in done.stderr
    assert "train.search.epochs: got 0" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_debug_shows_the_traceback(tmp_path):
    done = command("run", str(tmp_path / "none.yaml"), GRASP_LORA_DEBUG="1")
    assert done.returncode == 1
    assert "FileNotFoundError" in done.stderr
    assert "Traceback" in done.stderr


def test_an_option_shows_the_traceback_too(called, config, monkeypatch):
    def full(*_: Any, **__: Any) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x/y.json")

    monkeypatch.setattr(sys.modules["grasp_lora.plans.single"], "search_ratio", full)
    arguments = ("search", config, "--merged", "m", "--out", "there")
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert "error: 'x/y.json': no space is left on the disk; free some space, then" in done.output
    assert "Traceback" not in done.output
    assert isinstance(invoke("--debug", *arguments).exception, OSError)


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_a_terminal_that_is_not_utf8_gets_what_it_can_show(tmp_path, environment):
    path = tmp_path / "answers.jsonl"
    rows = [{"id": f"مدينة {n}", "prediction": "北京", "references": ["北京"]} for n in range(2)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    written = tmp_path / "مدينة.json"
    arguments = ["score", str(path), "--metrics", "exact_match", "--json", str(written)]
    done = command(*arguments, **environment)
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path}" in done.stdout
    assert written.exists()
    done = command("score", str(tmp_path / "مدينة"), **environment)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: no prediction file at ")


def test_a_finished_run_is_shown_again_and_said_to_be_done(called, config, tmp_path):
    write_scores(tmp_path)
    write_json(tmp_path / "done.json", {"finished": "2026-01-02T03:04:05+0000"})
    done = invoke("run", config, "--output", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "ratio 0.400, verdict learned" in done.output
    said = done.output.replace("\n", "")
    assert f"{tmp_path} holds this finished run already; --overwrite makes it again" in said
    assert "wrote" not in done.output


@pytest.mark.parametrize("kind", ["config", "ratio"])
def test_a_file_that_a_command_reads_is_not_overwritten_with_the_result(called, tmp_path, kind):
    out = tmp_path / "out"
    files = {"config": out / "run.yaml", "ratio": out / "ratio.json"}
    paths = {name: tmp_path / f"{name}.x" for name in files} | {kind: files[kind]}
    out.mkdir()
    paths["config"].write_text(YAML, encoding="utf-8")
    write_json(paths["ratio"], {"ratio": 0.5})
    arguments = ["finetune", str(paths["config"]), "--ratio", str(paths["ratio"]), "--start", "m"]
    done = invoke(*arguments, "--out", str(out), "--overwrite")
    assert done.exit_code == 2
    assert "would be replaced, but" in done.output
    assert not called


def test_a_description_does_not_replace_its_configuration(config):
    done = invoke("data", "describe", config, "--out", config, "--overwrite")
    assert done.exit_code == 2
    assert "would be replaced, but" in done.output
    assert Path(config).read_text(encoding="utf-8") == YAML


def test_a_bug_is_not_dressed_as_a_users_fault(called, config, monkeypatch):
    def broken(*_: Any, **__: Any) -> Path:
        raise KeyError("oops")

    monkeypatch.setattr(sys.modules["grasp_lora.plans.single"], "search_ratio", broken)
    done = invoke("search", config, "--merged", "m", "--out", "there")
    assert isinstance(done.exception, KeyError)


def test_ctrl_c_says_how_to_go_on(called, config, monkeypatch):
    def interrupted(*_: Any, **__: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["grasp_lora.plans.single"], "search_ratio", interrupted)
    done = invoke("search", config, "--merged", "m", "--out", "there")
    assert done.exit_code == 130
    assert "run the same command to resume" in done.output


def write_scores(run: Path) -> None:
    write_json(run / "ratio.json", {"ratio": 0.4, "verdict": "learned"})
    score = {"value": 12.5, "low": 5.0, "high": 20.0, "n": 8, "settings": {}}
    sets = {"test": {"language": "es", "n": 8, "scores": {"exact_match": score}}}
    row = {"name": "zero-shot", "slug": "zero-shot", "sets": sets}
    scores = {"task": "qa", "language": "es", "seed": 42, "systems": [row]}
    (run / "scores.json").write_text(json.dumps(scores), encoding="utf-8")


@pytest.mark.parametrize("option", ["--output", "--config"])
def test_a_path_of_the_command_line_with_a_control_character_is_refused(config, option):
    path = "C:\new\x1b[31m"
    arguments = ["run", config, "--output", path]
    if option == "--config":
        arguments = ["run", path]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2
    assert r"error: 'C:\new\x1b[31m' holds a control character" in done.output
    assert "\x1b" not in done.output


def test_an_error_cannot_command_the_terminal(config, tmp_path):
    folder = tmp_path / "a\u202eb"
    done = CliRunner().invoke(app, ["run", config, "--set", f"adapters.source={folder}"])
    assert done.exit_code == 2
    assert r"a\u202eb' does not exist" in done.output
    done = CliRunner().invoke(app, ["score", str(folder), "--language", "en"])
    assert done.exit_code == 2
    assert r"a\u202eb" in done.output
    assert "\u202e" not in done.output


def test_a_language_option_is_text(tmp_path):
    done = CliRunner().invoke(app, ["score", str(tmp_path / "none.jsonl"), "--language", "no"])
    assert "no prediction file" in done.output


def test_an_export_prints_its_difference_and_a_check_its_faults(tmp_path):
    adapter = tiny_adapter_folder(tmp_path / "a", tiny_model(), r=4, alpha_pattern={"v_proj": 2})
    checked = invoke("export", str(adapter), "--check", "llama.cpp")
    assert checked.exit_code == 1
    assert checked.stdout.startswith("llama.cpp: the global lora_alpha alone is read: 2 of 4")
    out = tmp_path / "out"
    done = invoke(
        *("export", str(adapter), "--to", "peft", "--public-name", "owner/name"),
        *("--out", str(out)),
    )
    assert done.exit_code == 0
    assert "read back: the deltas differ from the adapter's by" in done.stdout
    assert f"wrote {out}" in done.stdout
    again = invoke("export", str(out), "--check", "llama.cpp")
    assert again.exit_code == 0
    assert "llama.cpp reads" in again.stdout


def test_costs_are_a_row_for_each_adapter_and_a_word_on_zeros(tmp_path):
    tiny_backbone_folder(tmp_path / "base")
    adapter = tiny_adapter_folder(tmp_path / "a", tiny_model(), r=4)
    done = invoke("cost", str(adapter), "--model", str(tmp_path / "base"), "--dtype", "float32")
    assert done.exit_code == 0
    assert "no adapter" in done.stdout
    assert "Zeros alone make nothing smaller or faster" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give --to and --out, or --check ENGINE"),
        (["--to", "peft"], "give --to and --out, or --check ENGINE"),
        (["--to", "peft", "--check", "vllm"], "--check writes nothing"),
        (["--to", "peft", "--out", "x", "--public-name", "/a/b"], "is no hub id"),
    ],
)
def test_an_export_that_says_too_little_or_too_much_is_refused(tmp_path, options, message):
    done = invoke("export", str(tmp_path), *options)
    assert done.exit_code == 2
    assert message in done.stderr
