"""Commands that do a whole run or one of its stages, compare runs, or list the settings."""

from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from grasp_lora.base.words import from_percent, printable, shown
from grasp_lora.cli.common import (
    AS_PATH,
    AllowLeakage,
    Config,
    EngineFile,
    Jobs,
    On,
    Out,
    Output,
    Overwrite,
    Profile,
    Seed,
    Set,
    Threads,
    at_home,
    done,
    load,
    numbers_in,
    overrides,
    pool_of,
    prints,
    report_failures,
    stage,
    wrote,
)

if TYPE_CHECKING:
    from grasp_lora.config.run_config import RunConfig


def run(
    config: Config,
    settings: Set = None,
    output: Output = None,
    seed: Seed = None,
    allow_leakage: AllowLeakage = False,
    overwrite: Overwrite = False,
    profile: Profile = False,
) -> None:
    """Do the whole run: adapters, trials of recipes within a budget, the result, evaluation.

    Reads the configuration and the examples or adapters that it names. Writes the run folder:
    final/ (the adapter), recipe.json, ratio.json, scores.json, report.html, report.md. Run the
    same command again to resume an interrupted run. With recipe: grasp the run merges, searches the
    prune ratio, prunes and fine-tunes.
    """
    _run(load(config, settings, output, seed, allow_leakage), overwrite, profile)


def plan(
    config: Config,
    settings: Set = None,
    output: Output = None,
    seed: Seed = None,
    allow_leakage: AllowLeakage = False,
    gpu: Annotated[
        str | None,
        typer.Option(help="Also predict time, memory and price on this GPU, such as h100."),
    ] = None,
    gpus: Annotated[int, typer.Option(help="With --gpu: how many there are.")] = 1,
    model_size: Annotated[
        str | None,
        typer.Option(help="With --gpu: a size, such as 8B; default: the configured backbone's."),
    ] = None,
    price: Annotated[
        float | None, typer.Option(help="With --gpu: dollars an hour for one; default: a table's.")
    ] = None,
) -> None:
    """Show the stages of a run, which of them are done, and the highest cost of the others.

    Reads the configuration, the examples and the tokenizer, no weights. Writes nothing.
    """
    if gpu is None and (gpus != 1 or model_size is not None or price is not None):
        raise ValueError("--gpus, --model-size and --price need --gpu NAME, such as --gpu h100")
    loaded = load(config, settings, output, seed, allow_leakage)
    from rich.console import Console

    from grasp_lora.plans.forecast import forecast, place_of
    from grasp_lora.plans.show import left, planned_run
    from grasp_lora.report.plan import cost_line, forecast_lines, forecast_table, plan_table

    place = None if gpu is None else place_of(loaded, gpu, gpus, model_size, price)
    stages, rest = planned_run(loaded)
    console = Console(highlight=False)
    console.print(plan_table(stages))
    for one in stages:
        if one.why:
            console.print(printable(f"{one.name}: {'; '.join(one.why)}"), markup=False)
    waiting = sum(one.state != "done" for one in stages)
    console.print(cost_line(waiting, left(stages)))
    if rest is not None:
        console.print(rest)
    if place is not None:
        found = forecast(stages, loaded, place)
        console.print(forecast_table(found))
        for line in forecast_lines(found):
            console.print(line)


def demo(
    settings: Set = None,
    output: Output = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    profile: Profile = False,
) -> None:
    """Run English -> Spanish on an embedded question set with a small backbone, on the CPU.

    Reads nothing but the packages of `pip install grasp-lora[demo]`. Writes runs/demo, as `run`.
    """
    with resources.as_file(resources.files("grasp_lora") / "config" / "demo.yaml") as path:
        config = load(path, settings, output, seed)
    _run(config, overwrite, profile)


def train(
    config: Config,
    role: Annotated[
        Literal["source", "target"], typer.Option(help="Whose examples.", show_default=False)
    ],
    out: Out,
    settings: Set = None,
    seed: Seed = None,
    allow_leakage: AllowLeakage = False,
    overwrite: Overwrite = False,
) -> None:
    """Train one adapter.

    Reads the examples of data.source or data.target. Writes a PEFT adapter folder.
    """
    loaded = load(config, settings, None, seed, allow_leakage)
    from grasp_lora.plans.receipt import Request

    def work() -> Path:
        from grasp_lora.plans.single import train_adapter

        return train_adapter(loaded, role, out, overwrite=overwrite)

    request = Request(out, loaded, {"train": role})
    stage(out, overwrite, work, reads=[config], request=request)


def merge(
    what: Annotated[
        list[Path],
        typer.Argument(
            metavar="CONFIG|ADAPTER",
            help="YAML configuration, or two or more PEFT adapter folders.",
            show_default=False,
            **AS_PATH,
        ),
    ],
    out: Out,
    weights: Annotated[
        list[float] | None,
        typer.Option(
            metavar="W W...",
            help="Weight of each adapter folder, in their order; default: their average.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Backbone of the folders; default: the one that they name."),
    ] = None,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(
            "--adapter", help="With CONFIG: PEFT adapter; repeat it, source first.", **AS_PATH
        ),
    ] = None,
    settings: Set = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
) -> None:
    """Merge adapters of one backbone: folders, or those of a configuration.

    Reads the adapter folders; with CONFIG those of --adapter, without it adapters.source and
    adapters.target. Writes a PEFT adapter folder. Folders need no configuration and no examples;
    kind and rank of their merge are changed by --set merge.kind=svd.
    """
    request = None
    if len(what) == 1 and not what[0].is_dir():
        given = [name for name, one in (("--weights", weights), ("--model", model)) if one]
        if given:
            raise ValueError(
                f"{' and '.join(given)} has no effect beside a configuration; use --set "
                "merge.weights=[W,W] or --set model.name=NAME"
            )
        loaded, folders = load(what[0], settings, None, seed), adapter or []
        named = (loaded.adapters.source, loaded.adapters.target)
        folders = folders or [folder for folder in named if folder is not None]
        if not folders:
            raise ValueError(
                "no adapter to merge; give --adapter DIR, or set adapters.source and "
                "adapters.target"
            )
        from grasp_lora.plans.receipt import Request

        request = Request(out, loaded, {"merge": len(folders)}, folders)
    else:
        if adapter:
            raise ValueError("--adapter belongs to a configuration; name the folders alone: A B")
        from grasp_lora.cli.from_options import merge_config

        folders = what
        loaded = merge_config(folders, weights, model, overrides(settings, seed))

    def work() -> Path:
        from grasp_lora.plans.single import merge_adapters

        return merge_adapters(loaded, folders, out, overwrite=overwrite, weights=weights)

    stage(out, overwrite, work, reads=[one for one in what if one.is_file()], request=request)


def search(
    config: Config,
    merged: Annotated[
        Path, typer.Option(help="Merged adapter folder.", show_default=False, **AS_PATH)
    ],
    out: Out,
    settings: Set = None,
    seed: Seed = None,
    allow_leakage: AllowLeakage = False,
    overwrite: Overwrite = False,
) -> None:
    """Learn the prune ratio while fine-tuning a merged adapter.

    Reads the merged adapter and the target examples. Writes ratio.json, rounds.jsonl and adapter/.
    """
    loaded = load(config, settings, None, seed, allow_leakage)
    from grasp_lora.plans.receipt import Request

    def work() -> Path:
        from grasp_lora.plans.single import search_ratio

        return search_ratio(loaded, merged, out, overwrite=overwrite)

    request = Request(out, loaded, {"search": True}, [merged])
    stage(out, overwrite, work, reads=[config], request=request)


def finetune(
    config: Config,
    start: Annotated[
        Path, typer.Option(help="Adapter folder to prune.", show_default=False, **AS_PATH)
    ],
    ratio: Annotated[
        str, typer.Option(help="Fraction to remove, or a ratio.json.", show_default=False)
    ],
    out: Out,
    train: Annotated[
        bool,
        typer.Option("--train/--no-train", help="Train the adapter, or only prune and measure it."),
    ] = True,
    settings: Set = None,
    seed: Seed = None,
    allow_leakage: AllowLeakage = False,
    overwrite: Overwrite = False,
) -> None:
    """Prune an adapter at a ratio and fine-tune it.

    Reads the adapter and the target examples. Writes a PEFT adapter folder.
    """
    loaded = load(config, settings, None, seed, allow_leakage)
    from grasp_lora.plans.receipt import Request

    def work() -> Path:
        fraction, spread = _ratio(ratio, loaded)
        from grasp_lora.plans.single import prune_adapter

        options = {"spread": spread, "untrained": not train}
        return prune_adapter(loaded, start, fraction, out, overwrite=overwrite, options=options)

    file = at_home(Path(ratio))
    request = Request(out, loaded, {"finetune": train, "ratio": ratio}, [start, file])
    stage(out, overwrite, work, reads=[config, file], request=request)


def shrink(
    config: Config,
    adapter: Annotated[
        Path, typer.Option(help="Adapter folder to shrink.", show_default=False, **AS_PATH)
    ],
    budget_mb: Annotated[
        float,
        typer.Option(
            "--budget-mb", help="Most megabytes (10^6 bytes) of its numbers.", show_default=False
        ),
    ],
    out: Out,
    settings: Set = None,
    seed: Seed = None,
    allow_leakage: AllowLeakage = False,
    overwrite: Overwrite = False,
) -> None:
    """Fit a finished adapter into a number of bytes, by ranks and number formats of its modules.

    Reads the adapter and the micro-dev and dev examples, which choose; trains nothing. Writes a
    PEFT adapter folder, with quantized.safetensors, which keeps to the budget, and shrink.json.
    """
    loaded = load(config, settings, None, seed, allow_leakage)
    from grasp_lora.plans.receipt import Request

    def work() -> Path:
        from grasp_lora.plans.single import shrink_adapter

        return shrink_adapter(loaded, adapter, budget_mb, out, overwrite=overwrite)

    request = Request(out, loaded, {"shrink": budget_mb}, [adapter])
    stage(out, overwrite, work, reads=[config], request=request)


def precheck(
    config: Config,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Folder for precheck.json; without it no file is written.", **AS_PATH
        ),
    ] = None,
    rows: Annotated[int, typer.Option(help="Micro-dev and dev examples to measure on.")] = 16,
    settings: Set = None,
    seed: Seed = None,
    allow_leakage: AllowLeakage = False,
) -> None:
    """Advise whether to merge two trained adapters, by which weights, and whether to search.

    Reads adapters.source, adapters.target and the micro-dev and dev examples; trains nothing.
    Writes precheck.json into the folder of --out, if given.
    """
    loaded = load(config, settings, None, seed, allow_leakage)
    from grasp_lora.plans.precheck import precheck as check

    found = check(loaded, out, rows)
    if not prints():
        return
    from rich.console import Console

    from grasp_lora.report.data_words import different_prompts_line, known_line, prompt_lines
    from grasp_lora.report.run import precheck_table

    console = Console(highlight=False)
    console.print(precheck_table(found))
    console.print(printable(f"{found['advice']}: {found['why']}"), markup=False)
    for role, facts in found["prompts"].items():
        for line in prompt_lines(role, facts):
            console.print(printable(line), markup=False)
    different = different_prompts_line(found["prompts"])
    if different is not None:
        console.print(printable(different), markup=False)
    if found["known"] is not None:
        console.print(printable(known_line(found["known"])), markup=False)
    console.print(
        f"{found['forwards']} forwards, {found['share_of_run']:.0%} of search and final run"
    )
    if out is not None:
        wrote(out)


def ablate(
    config: Config,
    out: Out,
    only: Annotated[
        list[str] | None, typer.Option(help="Variant to run; may be repeated. Default: all.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds of the runs, separated by commas.")] = "42",
    jobs: Jobs = 0,
    threads: Threads = None,
    on: On = "local",
    engine: EngineFile = None,
    settings: Set = None,
    allow_leakage: AllowLeakage = False,
    overwrite: Overwrite = False,
) -> None:
    """Run the search and the final fine-tuning with each part of the controller left out.

    Reads the configuration and the examples or adapters that it names. Writes ablation.md,
    ablation.json and a folder for each run. Run the same command again to do what is missing.
    """
    numbers, pool = numbers_in(seeds), pool_of(jobs, threads, on, engine)
    loaded = load(config, settings, None, None, allow_leakage)
    from grasp_lora.plans.ablate import ablate as compare_variants

    found = compare_variants(loaded, out, only or (), numbers, pool, overwrite)
    from rich.console import Console

    from grasp_lora.report.run import ablation_table

    Console(highlight=False).print(ablation_table(found))
    wrote(out)
    report_failures(found["failed"])


def compare(
    config: Config,
    out: Out,
    only: Annotated[
        list[str] | None, typer.Option(help="Method to run; may be repeated. Default: all.")
    ] = None,
    seeds: Annotated[
        str, typer.Option(help="Seeds of the main methods, separated by commas.")
    ] = "42,1337,9001",
    jobs: Jobs = 0,
    threads: Threads = None,
    on: On = "local",
    engine: EngineFile = None,
    settings: Set = None,
    allow_leakage: AllowLeakage = False,
    overwrite: Overwrite = False,
) -> None:
    """Run the method and all baselines on your own model and data, and compare them.

    Reads the configuration and the examples or adapters that it names. Writes comparison.md, .csv,
    .json, pictures and a folder for each run. Run the same command again to do what is missing.
    """
    numbers, pool = numbers_in(seeds), pool_of(jobs, threads, on, engine)
    loaded = load(config, settings, None, None, allow_leakage)
    from grasp_lora.plans.compare import compare_methods

    found = compare_methods(loaded, out, only or (), numbers, pool, overwrite)
    from rich.console import Console

    from grasp_lora.report.comparison import comparison_tables

    console = Console(highlight=False)
    for table in comparison_tables(found):
        console.print(table)
    for name, why in found["not_applicable"].items():
        console.print(printable(f"{name}: not applicable, {why}"), markup=False)
    wrote(out)
    report_failures(found["failed"])


def sweep(
    file: Annotated[
        Path, typer.Argument(help="YAML file of the sweep.", show_default=False, **AS_PATH)
    ],
    out: Out,
    jobs: Jobs = 1,
    threads: Threads = None,
    on: On = "local",
    engine: EngineFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Run configurations in several languages, with several seeds, as one plan with one table.

    Reads the file, the configuration that it names, and their examples or adapters. Writes
    sweep.md, sweep.json, the adapters, and a folder for each cell. Run the same command again to
    do what is missing.
    """
    from grasp_lora.config.sweep import load_sweep

    pool, asked = pool_of(jobs, threads, on, engine), load_sweep(file)
    from rich.console import Console

    from grasp_lora.plans.sweep import sweep as do_sweep
    from grasp_lora.report.sweep import sweep_tables

    found = do_sweep(asked, out, pool, overwrite)
    console = Console(highlight=False)
    for table in sweep_tables(found):
        console.print(table)
    wrote(out)
    report_failures(found["failed"])


def status(
    folder: Annotated[
        Path,
        typer.Argument(help="Folder of compare, ablate or sweep.", show_default=False, **AS_PATH),
    ],
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON in place of a table.")
    ] = False,
) -> None:
    """Show which stages of a folder are done, running, waiting, failed or refused.

    Reads the folder alone, so it works on any machine that sees it. Writes nothing.
    """
    import json

    from rich.console import Console

    from grasp_lora.plans.status import folder_status
    from grasp_lora.report.plan import status_table

    found = folder_status(folder)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        Console(highlight=False).print(status_table(found))


def settings_list() -> None:
    """List every setting with its default and its meaning.

    Reads nothing. Writes nothing.
    """
    from grasp_lora.config.reference import settings_markdown

    typer.echo(settings_markdown(), nl=False)


def schema() -> None:
    """Print the JSON schema of a configuration, by which editors complete and check the YAML.

    Reads nothing. Writes nothing: `grasp-lora schema > FILE` keeps it, and a first line
    `# yaml-language-server: $schema=FILE` of a configuration names it.
    """
    import json

    from grasp_lora.config.reference import settings_schema

    typer.echo(json.dumps(settings_schema(), indent=2))


def _run(config: "RunConfig", overwrite: bool, profile: bool) -> None:
    from grasp_lora.base.files import finished_at
    from grasp_lora.plans.receipt import run_request

    def work() -> Path:
        from grasp_lora.plans.run import run as run_all

        return run_all(config, overwrite=overwrite, profile=profile)

    before = finished_at(config.output)
    folder = done(run_request(config), overwrite, work)
    if not prints():
        return
    _show_run(folder)
    if before is not None and finished_at(folder) == before:
        typer.echo(
            f"{printable(str(folder))} holds this finished run already; --overwrite makes it again"
        )
    else:
        wrote(folder)


def _show_run(folder: Path) -> None:
    """Print what a finished run found."""
    from rich.console import Console

    from grasp_lora.base.files import read_json
    from grasp_lora.report.choice import ship_parts, tried_lines
    from grasp_lora.report.run import (
        difference_lines,
        finding_lines,
        score_tables,
        unpruned_of,
        verdict_words,
    )

    scores, ratio = read_json(folder / "scores.json"), read_json(folder / "ratio.json")
    console = Console(highlight=False)
    if (folder / "recipe.json").exists():
        choice = read_json(folder / "recipe.json")
        line = " | ".join(ship_parts(choice, printable(str(folder / "final"))))
        console.print(line, markup=False, style="bold")
        for table in score_tables(scores):
            console.print(table)
        if scores["systems"]:
            console.print("all scores with their 95 % intervals: report.html")
        for line in tried_lines(choice, ratio):
            console.print(printable(line), markup=False)
        return
    for table in score_tables(scores):
        console.print(table)
    console.print("all scores with their 95 % intervals: report.html")
    console.print(f"ratio {ratio['ratio']:.3f}, verdict {ratio['verdict']}")
    for line in finding_lines(ratio):
        console.print(printable(line), markup=False)
    if scores["systems"]:
        console.print(printable(verdict_words(scores)), markup=False)
        against = difference_lines(scores).get(unpruned_of(scores))
        if against is not None:
            console.print(printable(f"- {against}"), markup=False)


def _ratio(text: str, config: "RunConfig") -> tuple[float, dict[str, float] | None]:
    """Return the ratio in text like `0.4` or in a `ratio.json`, and its group -> ratio or None."""
    try:
        ratio = float(text)
    except ValueError:
        ratio = None
    meant = from_percent(text if ratio is None else ratio)
    if ratio is None and meant is None:
        from grasp_lora.workbench.merged_folder import read_ratio

        return read_ratio(at_home(Path(text)), config)
    if ratio is None or not 0 <= ratio <= 1:
        like = "like 0.4" if meant is None else f"write {meant:g}"
        raise ValueError(
            f"--ratio {shown(text)} is no fraction in [0, 1]; give the fraction to remove, {like}"
        )
    return ratio, None
