"""The command line. A command builds settings from its arguments, does the work, prints the folder.

torch and transformers are imported inside the commands, so that `--help` answers at once. Errors
that the user can correct are printed as `error: ...` with exit code 2. Set GRASP_LORA_DEBUG=1 to
see the traceback instead.
"""

import typer

from grasp_lora.cli import scores, stages
from grasp_lora.cli.common import Commands

__all__ = ["app", "main"]

_LOOK = {"add_completion": False, "rich_markup_mode": None, "pretty_exceptions_enable": False}

app = typer.Typer(
    name="grasp-lora",
    cls=Commands,
    help="Merge a source and a target language LoRA adapter, learn how much of the merge to prune, "
    "and fine-tune it at that ratio. The result is an ordinary PEFT adapter.",
    no_args_is_help=True,
    **_LOOK,
)
for command in (
    stages.run,
    stages.plan,
    stages.demo,
    stages.train,
    stages.merge,
    stages.search,
    stages.finetune,
    stages.precheck,
    stages.ablate,
    stages.compare,
    scores.evaluate,
    scores.score,
):
    app.command()(command)
app.command(name="settings")(stages.settings_list)

data = typer.Typer(help="Look at the examples of a configuration.", no_args_is_help=True, **_LOOK)
data.command()(scores.describe)
app.add_typer(data, name="data")


def main() -> None:
    """Entry point of the `grasp-lora` command."""
    app()
