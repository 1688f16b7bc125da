"""The command line. A command builds settings from its arguments, does the work, prints the folder.

torch and transformers are imported inside the commands, so that `--help` answers at once. Errors
of the user and of the machine are printed as `error: ...` with exit code 2. `grasp-lora --debug`,
or GRASP_LORA_DEBUG=1, shows the traceback instead.
"""

import sys
from io import TextIOWrapper

import typer

from grasp_lora.cli import exports, report, scores, stages, start
from grasp_lora.cli.common import Commands, Debug, SeveralWeights

__all__ = ["app", "main"]

_LOOK = {"rich_markup_mode": None, "pretty_exceptions_enable": False}

app = typer.Typer(
    name="grasp-lora",
    cls=Commands,
    help="Merge a source and a target language LoRA adapter, learn how much of the merge to prune, "
    "and fine-tune it at that ratio. The result is an ordinary PEFT adapter.",
    no_args_is_help=True,
    **_LOOK,
)


@app.callback()
def options(debug: Debug = False) -> None:
    # The group itself looks at the option when it prints errors.
    del debug


for command in (
    stages.run,
    stages.plan,
    stages.demo,
    stages.train,
    stages.search,
    stages.finetune,
    stages.shrink,
    stages.precheck,
    stages.ablate,
    stages.compare,
    stages.sweep,
    stages.status,
    scores.evaluate,
    scores.score,
    exports.export,
    exports.push,
    exports.cost,
    report.report,
    stages.schema,
    start.init,
    start.doctor,
):
    app.command()(command)
app.command(cls=SeveralWeights)(stages.merge)
app.command(name="settings")(stages.settings_list)

data = typer.Typer(help="Look at the examples of a configuration.", no_args_is_help=True, **_LOOK)
data.command()(scores.describe)
app.add_typer(data, name="data")


def main() -> None:
    """Entry point of the `grasp-lora` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal that cannot show a letter gets its number.
            stream.reconfigure(errors="backslashreplace")
    app()
