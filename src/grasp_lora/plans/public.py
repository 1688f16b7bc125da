"""A run and an evaluation for Python: settings and rows in, an object that shows its scores out."""

import copy
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from grasp_lora.base.files import read_json
from grasp_lora.base.words import shown
from grasp_lora.config.run_config import RunConfig, load_config, make_config
from grasp_lora.plans import run as runs
from grasp_lora.plans.single import evaluate_adapter
from grasp_lora.report.run import score_tables
from grasp_lora.scoring.cells import evaluation_tables
from grasp_lora.scoring.sets import missing_metrics
from grasp_lora.workbench.context import open_context
from grasp_lora.workbench.processes import join
from grasp_lora.workbench.rows import Given, Rows, load_run_data

Config = RunConfig | Mapping[str, Any] | str | Path
"""Settings: of `load_config`, as nested dictionaries with the keys of the YAML, or a YAML file."""

_ROLES = ("source", "target", "extra", "tests")
_WIDTH = 120


@dataclass(frozen=True)
class RunResult:
    """What a finished run has in its folder.

    Attributes:
        folder: the run folder.
    """

    folder: Path

    @property
    def final(self) -> Path:
        """The folder of the adapter to ship, an ordinary PEFT folder."""
        return self.folder / "final"

    @property
    def verdict(self) -> str:
        """What the search of the ratio showed: `learned`, `flat`, `never-fired` or `not-probed`."""
        return read_json(self.folder / "ratio.json")["verdict"]

    @property
    def scores(self) -> dict[str, Any]:
        """The content of `scores.json`: all systems, their scores and their comparison."""
        return read_json(self.folder / "scores.json")

    def table(self) -> str:
        """Return the scores of all systems as text, a table for each test set."""
        return _text(score_tables(self.scores))

    def _repr_html_(self) -> str:
        return _html(score_tables(self.scores))


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation has in its folder.

    Attributes:
        folder: the folder, with `scores.json` and `predictions.jsonl`.
    """

    folder: Path

    @property
    def scores(self) -> dict[str, Any]:
        """The content of `scores.json`: each score with its interval and its settings."""
        return read_json(self.folder / "scores.json")

    def table(self) -> str:
        """Return the scores as text, a table for each test set."""
        return _text(evaluation_tables(self.folder))

    def _repr_html_(self) -> str:
        return _html(evaluation_tables(self.folder))


def run(
    config: Config,
    rows: Given | Mapping[str, Rows] | Rows | None = None,
    *,
    overwrite: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Do all stages of a run that are not done yet: from adapters and labels to one adapter.

    An interrupted run resumes where it stopped. In a notebook the result shows its scores.

    Args:
        config: the settings, or the path of a YAML file; `output` is the run folder.
        rows: examples of the target from Python in place of `data.target.files`: a `DatasetDict`
            with the splits `train`, `validation` (or `dev`), `micro_dev` and `test`, of which only
            `train` is needed; or one `Dataset` or list of mappings, which is divided like a file.
            With the keys `source`, `target`, `extra` or `tests`, each holds rows in one of these
            forms.
        overwrite: replace results in the folder that were made with other settings.
        quiet: print nothing.

    Returns:
        The result: `.final`, `.verdict`, `.scores`, `.table()`.

    Raises:
        ValueError, FileNotFoundError: a setting, a file, an adapter or the machine does not allow
            the run; raised before any work.
        FloatingPointError: a training loss became NaN.
    """
    given = None if rows is None else _by_role(rows)
    return RunResult(runs.run(_settings(config, training=True), overwrite, quiet, given))


def evaluate(
    adapter: str | Path | None,
    config: Config,
    *,
    out: str | Path,
    rows: Rows | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> EvaluationResult:
    """Answer the test examples with an adapter, and score the answers by the language's rules.

    Args:
        adapter: a PEFT adapter folder; None scores the bare model.
        config: the settings, or the path of a YAML file: model, task, language and test examples.
        out: folder of the result.
        rows: test examples from Python: a `Dataset`, or a list of mappings.
        overwrite: replace a result that was made from other inputs.
        quiet: print nothing.

    Returns:
        The result: `.scores`, `.table()`.

    Raises:
        ValueError, FileNotFoundError: a setting, a file or the adapter does not allow it, or `out`
            holds another result and `overwrite` is not set.
    """
    settings = _settings(config, training=False)
    missing = missing_metrics(settings)
    if missing:
        raise ValueError("; ".join(missing))
    given = None if rows is None else {"target": {"test": rows}}
    join(settings)
    data = load_run_data(settings, lambda _line: None, given=given, training=False)
    context = open_context(settings, quiet, data, training=False)
    folder = None if adapter is None else Path(adapter)
    return EvaluationResult(evaluate_adapter(settings, folder, Path(out), overwrite, context))


def _settings(config: Any, training: bool) -> RunConfig:
    if isinstance(config, RunConfig):
        return config
    if isinstance(config, Mapping):
        return make_config(copy.deepcopy(dict(config)), training=training)
    if isinstance(config, (str, Path)):
        return load_config(config, training=training)
    raise ValueError(
        f"config is {shown(config)}, but must be settings (load_config), a mapping with the keys "
        "of the YAML, or the path of a YAML file"
    )


def _by_role(rows: Any) -> Given:
    """Return rows by role; without a role they are the target's."""
    by_role = isinstance(rows, Mapping) and set(rows) <= set(_ROLES)
    return rows if by_role else {"target": rows}


def _text(tables: list[Any]) -> str:
    console = Console(file=io.StringIO(), width=_WIDTH, highlight=False)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get()


def _html(tables: list[Any]) -> str:
    console = Console(file=io.StringIO(), width=_WIDTH, highlight=False, record=True)
    for table in tables:
        console.print(table)
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
