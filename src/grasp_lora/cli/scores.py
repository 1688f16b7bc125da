"""The commands evaluate, score and data describe."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from grasp_lora.base.files import protect
from grasp_lora.base.words import check_path, printable, shown_path
from grasp_lora.cli.common import (
    AS_PATH,
    AllowLeakage,
    Config,
    Out,
    Overwrite,
    Seed,
    Set,
    load,
    overrides,
    prints,
    stage,
)


def evaluate(
    adapter: Annotated[
        str,
        typer.Argument(
            help="PEFT adapter folder of any type; a model folder, short name or hub id for a bare "
            "model; none for the bare backbone of --config.",
            show_default=False,
        ),
    ],
    out: Out,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", help="Take model, task and test examples from this YAML.", **AS_PATH
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data", metavar="[NAME=]FILE", help="Labelled examples; repeat for test sets."
        ),
    ] = None,
    task: Annotated[str, typer.Option(help="qa, summarization or text-to-text.")] = "qa",
    language: Annotated[
        list[str] | None,
        typer.Option(help="Language code: once for all files, or once for every --data."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model; replaces the one that the adapter names.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Prompt template; replaces that of the language.")
    ] = None,
    settings: Set = None,
    seed: Seed = None,
    allow_leakage: AllowLeakage = False,
    overwrite: Overwrite = False,
) -> None:
    """Answer test examples with an adapter or a bare model, and score the answers.

    Reads the adapter, and either --config or --data with --language. Writes predictions.jsonl and
    scores.json: each score with n, its interval and its settings, and the mean and the worst over
    several test sets.
    """
    # The argument may be a name, a hub id or a path; `at_home` takes paths only.
    check_path(adapter)
    adapter = os.path.expanduser(adapter)
    model = None if model is None else os.path.expanduser(model)
    if (config is None) == (data is None):
        raise ValueError(
            "give either --config YAML (its test rows) or --data FILE with --language (rows of a "
            "file)"
        )
    request = None
    if config is not None:
        unused = {"--language": language, "--model": model, "--prompt": prompt}
        given = [name for name, value in unused.items() if value is not None]
        if given:
            raise ValueError(f"{', '.join(given)} has no effect beside --config; use --set")
        loaded = load(config, settings, None, seed, allow_leakage, training=False)
        from grasp_lora.plans.receipt import Request

        request = Request(out, loaded, {"evaluate": adapter}, [Path(adapter)])
    else:
        from grasp_lora.cli.from_options import evaluation_config

        loaded = evaluation_config(
            adapter, task, data or [], language or [], model, prompt, overrides(settings, seed)
        )

    def work() -> Path:
        from grasp_lora.adapters.opening import is_adapter

        bare = adapter == "none" or not is_adapter(adapter)
        if bare and config is not None and adapter != "none":
            raise ValueError(
                f"{shown_path(adapter)} is no PEFT adapter; give an adapter folder, or none for "
                "the bare backbone of the configuration"
            )
        folder = None if bare else Path(adapter)
        from grasp_lora.plans.single import evaluate_adapter

        return evaluate_adapter(loaded, folder, out, overwrite=overwrite)

    stage(out, overwrite, work, reads=[config], request=request)
    if prints():
        from rich.console import Console

        from grasp_lora.scoring.cells import evaluation_tables

        for table in evaluation_tables(out):
            Console(highlight=False).print(table)


def describe(
    config: Config,
    settings: Set = None,
    seed: Seed = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Markdown file that receives the text too.", **AS_PATH),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file that --out names.")
    ] = False,
) -> None:
    """Show the examples of a configuration as the model sees them.

    Reads the examples and the tokenizer, no weights. Prints for each split: number of examples,
    lengths, cuts, fertility and label tokens. Also prints some examples with prompt and answer
    marked, and whether splits share examples. Writes the file of --out, if given.
    """
    loaded = load(config, settings, None, seed, training=False)
    if out is not None:
        protect([config], [out])
    from grasp_lora.workbench.describe import describe_data

    typer.echo(printable(describe_data(loaded, out, overwrite=overwrite)))


def score(
    file: Annotated[
        Path,
        typer.Argument(
            help='JSON lines {"id", "prediction", "references": [...]}.',
            show_default=False,
            **AS_PATH,
        ),
    ],
    language: Annotated[
        str | None,
        typer.Option(help="Language code of the answers, like ar; default: guessed by script."),
    ] = None,
    task: Annotated[
        Literal["qa", "summarization", "text-to-text"],
        typer.Option(help="Kind of task; it is recorded in the result."),
    ] = "qa",
    json: Annotated[Path | None, typer.Option("--json", help="File to write.", **AS_PATH)] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            help="The same rows answered by another system, for a paired test.",
            **AS_PATH,
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Metrics separated by commas; default: all that are installed."),
    ] = None,
    rules: Annotated[
        Literal["squad", "mlqa", "mlqa-fixed", "unicode"] | None,
        typer.Option(
            help="Rules of exact match and F1; default: unicode for languages without spaces "
            "between words, squad for others."
        ),
    ] = None,
    rouge: Annotated[
        Literal["unicode", "xlsum"], typer.Option(help="How ROUGE splits a text into words.")
    ] = "unicode",
    bertscore_model: Annotated[
        str | None, typer.Option(help="Encoder for BERTScore, a folder or a name.")
    ] = None,
    bertscore_layer: Annotated[
        int | None, typer.Option(help="Layer of the BERTScore encoder.")
    ] = None,
    bertscore_rescale: Annotated[
        bool, typer.Option("--bertscore-rescale", help="Rescale BERTScore by its baseline.")
    ] = False,
    resamples: Annotated[
        int, typer.Option(min=0, help="Resamples for intervals and p-values; 0 for none.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resampling.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the file that --json names.")
    ] = False,
) -> None:
    """Score the answers of any system, with intervals, or test whether two systems differ.

    Reads the predictions; rows with the same "group" are resampled together. Prints a table, or
    with --against a line for each metric, where A is FILE. Writes the file of --json, if given.
    """
    from rich.console import Console

    from grasp_lora.config.languages import language_code
    from grasp_lora.metrics.records import Options
    from grasp_lora.report import score_words as words
    from grasp_lora.scoring import files as recipe

    names = None if metrics is None else [n.strip() for n in metrics.split(",") if n.strip()]
    options = Options(
        task=task,
        language=language_code(language or recipe.UNKNOWN),
        rules=rules,
        rouge=rouge,
        bertscore_model=bertscore_model,
        bertscore_layer=bertscore_layer,
        bertscore_rescale=bertscore_rescale,
        resamples=resamples,
        seed=seed,
    )
    if against is None:
        result = recipe.score_file(file, options, names, json, overwrite)
        Console(highlight=False).print(words.score_table(result))
    else:
        result = recipe.compare_files(file, against, options, names, json, overwrite)
        typer.echo(printable("\n".join(words.comparison_lines(result))))
    for note in words.result_notes(result):
        typer.echo(f"note: {printable(note)}", err=True)
    if json is not None:
        typer.echo(f"wrote {printable(str(json))}")
