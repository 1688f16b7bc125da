"""A description of the examples as the model sees them: sizes, cuts, tokens, texts, leakage."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from grasp_lora.adapters.chat import put_template
from grasp_lora.base.files import protect, touch, write_text
from grasp_lora.base.words import fenced, in_markdown, shown_path
from grasp_lora.config.run_config import RunConfig, section_of
from grasp_lora.models.backbones import load_tokenizer
from grasp_lora.tasks.base import Example, task_named
from grasp_lora.tasks.encoding import EncodedExample, Encoding
from grasp_lora.workbench.context import (
    fitting,
    left_out_line,
    max_length,
    model_spec,
    part_encoding,
    part_rows,
    prompt_notices,
    template_given,
)
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import RunData, load_run_data

SHOWN_EXAMPLES = 3
PROMPT_MARK, ANSWER_MARK, END_MARK = "[PROMPT>", "[ANSWER>", "<END]"
_HEAD = (
    "| rows of | language | rows | contexts | context chars | prompt tokens (median, longest) "
    "| cut rows | tokens cut | answers cut off | label tokens (mean, longest) | fertility |"
)


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
    notes += prompt_notices(config, data)
    tokenizer, name, vocabulary = load_tokenizer(model_spec(config), Reporter(quiet).say)
    notes += put_template(tokenizer, template_given(config))
    lines = [f"# Rows of a run: {config.data.task}, tokenizer of {name}", "", *_verdict(data)]
    lines += [
        "",
        *(f"- {in_markdown(note)}" for note in notes),
        "",
        _HEAD,
        "|---|---|" + "---:|" * 9,
    ]
    shown: dict[str, list[str]] = {}
    lost: list[str] = []
    for role, split in ((r, s) for r in data.parts for s in data.parts[r]):
        encoding = part_encoding(config, tokenizer, role, split)
        lengths = _lengths(part_rows(config, data, encoding, role, split, vocabulary))
        report = encoding.report()
        examples = fitting(data.parts[role][split], report.left_out)
        if report.left_out:
            why = left_out_line(report, max_length(config))
            lost.append(f"- {in_markdown(f'{role} {split}: {why}')}")
        language = section_of(config, role, split).language
        lines.append(_row(f"{role}/{split}", language, examples, lengths, encoding))
        if language not in shown and examples:
            shown[language] = list(_examples(examples, lengths.first, tokenizer, f"{role}/{split}"))
    lines += ["", *lost, *([""] if lost else []), _footnote(config), ""]
    for language, texts in shown.items():
        lines += [f"## {language}, as the model sees it", "", *texts]
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


@dataclass(frozen=True)
class _Lengths:
    """What is shown of encoded examples. Token ids of all of them would take a kilobyte each."""

    prompts: "array[int]"
    """Tokens of each prompt."""
    labels: "array[int]"
    """Tokens of each answer."""
    first: list[EncodedExample]


def _lengths(encoded: Iterable[EncodedExample]) -> _Lengths:
    found = _Lengths(array("l"), array("l"), [])
    for row in encoded:
        found.prompts.append(row.prompt_length)
        found.labels.append(row.label_tokens)
        if len(found.first) < SHOWN_EXAMPLES:
            found.first.append(row)
    return found


def _row(
    where: str, language: str, examples: Sequence[Example], lengths: _Lengths, encoding: Encoding
) -> str:
    if not examples:
        return f"| {in_markdown(where)} | {language} | 0 |{' |' * 8}"
    prompts, labels, report = sorted(lengths.prompts), lengths.labels, encoding.report()
    fertility, unit = encoding.fertility()
    cells = [
        in_markdown(where),
        language,
        str(len(examples)),
        str(len({e.group for e in examples})),
        f"{fmean(_body_length(e) for e in examples):.0f}",
        f"{prompts[len(prompts) // 2]}, {prompts[-1]}",
        f"{report.truncated} ({report.truncated / len(examples):.0%})",
        str(report.cut_tokens_total),
        str(report.answers_lost),
        f"{fmean(labels):.1f}, {max(labels)}",
        f"{fertility or 0:.2f} a {unit}",
    ]
    return f"| {' | '.join(cells)} |"


def _body_length(example: Example) -> int:
    return len(next(iter(example.fields.values())))


def _footnote(config: RunConfig) -> str:
    task = task_named(config.data.task)
    kept = config.evaluate.max_new_tokens or task.new_tokens(config.data.target.language)
    return (
        f"Rows hold at most {max_length(config)} tokens; test rows keep room for an answer of "
        f"{kept}. Fertility: tokens of the tokenizer per word, or per character in scripts without "
        "spaces between words; above 3 per word, words are split into many small pieces. Answers "
        "cut off: rows whose answer was in the part of the context that did not fit."
    )


def _examples(
    examples: Sequence[Example], encoded: Sequence[EncodedExample], tokenizer: Any, where: str
) -> Iterator[str]:
    for example, row in zip(examples, encoded, strict=False):
        ids = list(row.input_ids)
        prompt = tokenizer.decode(ids[: row.prompt_length])
        answer = tokenizer.decode(ids[row.prompt_length :])
        yield f"Row {in_markdown(example.id)} of {in_markdown(where)}:"
        yield ""
        yield from fenced(f"{PROMPT_MARK}{prompt}{ANSWER_MARK}{answer}{END_MARK}")
        yield ""
