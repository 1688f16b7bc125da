"""The rows of every split as the model sees them: a table of their lengths, and the first ones."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from grasp_lora.adapters.chat import put_template
from grasp_lora.base.words import fenced, in_markdown
from grasp_lora.config.run_config import RunConfig, section_of
from grasp_lora.models.backbones import load_tokenizer
from grasp_lora.tasks.base import Example, task_named
from grasp_lora.tasks.encoding import COUNTED, EncodedExample, Encoding
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
from grasp_lora.workbench.rows import RunData

SHOWN_EXAMPLES = 3
PROMPT_MARK, ANSWER_MARK, END_MARK = "[PROMPT>", "[ANSWER>", "<END]"
_HEAD = (
    "| rows of | language | rows | contexts | context chars | prompt tokens (median, longest) "
    "| cut rows | tokens cut | answers cut off | label tokens (mean, longest) | fertility |"
)


def encoded_parts(
    config: RunConfig, data: RunData, quiet: bool
) -> tuple[str, list[str], list[str]]:
    """Return the name of the model, notes on the prompts, and lines on every split, in Markdown.

    Raises:
        FileNotFoundError, ValueError: the tokenizer cannot be read, or a token of an example has no
            row in the model's embedding.
    """
    notes = prompt_notices(config, data)
    tokenizer, name, vocabulary, start = load_tokenizer(model_spec(config), Reporter(quiet).say)
    notes += put_template(tokenizer, template_given(config))
    lines = [_HEAD, "|---|---|" + "---:|" * 9]
    shown: dict[str, list[str]] = {}
    lost: list[str] = []
    for role, split in ((r, s) for r in data.parts for s in data.parts[r]):
        encoding = part_encoding(config, tokenizer, role, split, None, start)
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
    return name, notes, lines


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
    fertility, unit, drawn = encoding.fertility()
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
        f"{fertility or 0:.2f} a {unit}{f' ({drawn:,} texts)' if drawn else ''}",
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
        "spaces between words; above 3 per word, words are split into many small pieces; of more "
        f"than {COUNTED:,} texts it is counted on that many, drawn at random. Answers "
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
