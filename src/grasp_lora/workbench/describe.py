"""A description of the examples as the model sees them: sizes, cuts, tokens, texts, leakage."""

from collections.abc import Iterator
from pathlib import Path

from grasp_lora.base.files import protect, touch, write_text
from grasp_lora.base.words import in_markdown, shown_path
from grasp_lora.config.run_config import RunConfig
from grasp_lora.workbench.rows import RunData, load_run_data


def describe_data(
    config: RunConfig, out: Path | None = None, quiet: bool = False, overwrite: bool = False
) -> str:
    """Return a description of every split of a configuration, in Markdown.

    The tokenizer is loaded, the weights are not. Examples that two splits share raise no error
    here: the description reports them as leakage.

    Args:
        config: the run's settings.
        out: a Markdown file that receives the description; None writes no file.
        quiet: print no progress.
        overwrite: replace `out` if it exists.

    Raises:
        FileNotFoundError, ValueError: the examples or the tokenizer cannot be read, a token of an
            example has no row in the model's embedding, `out` exists and `overwrite` is not set, or
            `out` is a file of examples.
        OSError: `out` cannot be written; raised before any work.
    """
    if out is not None and out.exists() and not overwrite:
        raise ValueError(
            f"{shown_path(out)} exists; name another file, or pass --overwrite to replace it"
        )
    if out is not None:
        protect(config.named_paths().values(), [out])
        touch(out)
    notes: list[str] = []
    tolerant = config.model_copy(
        update={"data": config.data.model_copy(update={"allow_leakage": True})}
    )
    data = load_run_data(tolerant, notes.append, training=False)
    # torch is loaded after the search for leaks: a large set needs a few hundred MB less then.
    from grasp_lora.workbench.encoded_parts import encoded_parts

    name, more, parts = encoded_parts(config, data, quiet)
    lines = [
        f"# Rows of a run: {config.data.task}, tokenizer of {name}",
        "",
        *_verdict(data),
        "",
        *(f"- {in_markdown(note)}" for note in [*notes, *more]),
        "",
        *parts,
    ]
    text = "\n".join(lines)
    if out is not None:
        write_text(out, text)
    return text


def _verdict(data: RunData) -> Iterator[str]:
    if not data.leaks:
        yield (
            "Leakage: none found (ids across languages, contexts, exact and near-duplicate texts)."
        )
        return
    yield f"**Leakage: {len(data.leaks)} pairs of examples are in two splits.** A run refuses them:"
    yield ""
    for leak in data.leaks[:10]:
        first, second = (" ".join(side) for side in (leak.first, leak.second))
        yield in_markdown(f"- {leak.kind}: {first} and {second}, similarity {leak.similarity:.2f}")
    if len(data.leaks) > 10:
        yield f"- and {len(data.leaks) - 10} more"
