"""The context that all stages share: settings, examples, backbone, reporter and clock."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from grasp_lora.adapters.chat import GivenTemplate, given_template, put_template
from grasp_lora.base.clock import Clock
from grasp_lora.base.words import shown
from grasp_lora.config.run_config import RunConfig, section_of
from grasp_lora.config.sections import TrainingName
from grasp_lora.core.lora import MergedModule
from grasp_lora.core.merge_kinds import SUMMED_RANKS
from grasp_lora.core.pruning.importance import NEEDS_GRADIENTS, READS_ROWS, is_blank
from grasp_lora.core.pruning.second_order import Curvature
from grasp_lora.models.backbones import (
    Backbone,
    ModelSpec,
    forward_accepts,
    load_backbone,
    plan_memory,
)
from grasp_lora.models.example_losses import (
    EncodedExamples,
    can_share_prefix,
    forward_tokens,
)
from grasp_lora.models.memory import MemoryPlan
from grasp_lora.models.vocabulary import check_tokens
from grasp_lora.tasks.base import Example, Task, task_named
from grasp_lora.tasks.encoding import (
    Collator,
    EncodedExample,
    Encoding,
    EncodingReport,
    TwoSidedCollator,
)
from grasp_lora.tasks.prompts import template_for
from grasp_lora.training.activations import input_moments, input_norms
from grasp_lora.training.gradients import averages_over
from grasp_lora.training.live import LiveAdapter, attach_live_adapter
from grasp_lora.workbench.processes import is_main, join
from grasp_lora.workbench.reporter import Reporter
from grasp_lora.workbench.rows import RunData, load_run_data, without_held


@dataclass
class Context:
    """What one process has loaded. It is built once and shared by the stages of a run.

    Attributes:
        config: the run's settings.
        data: the examples of each role and split.
        backbone: the bare model with its tokenizer; stages attach adapters to it and detach them.
        task: the task of the examples.
        reporter: prints for the user.
        clock: measures how much time each part of the work takes.
        on_saved: called after every checkpoint.
        encoding_reports: "role/split" -> how the encoding of that set went.
    """

    config: RunConfig
    data: RunData
    backbone: Backbone
    task: Task
    reporter: Reporter
    clock: Clock = field(default_factory=Clock)
    on_saved: Callable[[], Any] = lambda: None
    encoding_reports: dict[str, EncodingReport] = field(default_factory=dict)
    _encoded: dict[tuple[str, str], list[EncodedExample]] = field(default_factory=dict)
    _norms_known: dict[tuple[str, str], Mapping[str, Any]] = field(default_factory=dict)

    @property
    def collator(self) -> Collator | TwoSidedCollator:
        """The collator; it builds only arguments that the backbone accepts."""
        model = self.backbone.model
        if self.backbone.encoder_decoder:
            return TwoSidedCollator(self.backbone.pad_id)
        return Collator(
            self.backbone.pad_id,
            with_position_ids=forward_accepts(model, "position_ids"),
            with_logits_to_keep=forward_accepts(model, "logits_to_keep"),
        )

    @property
    def longest(self) -> int:
        """The most tokens of an encoded example.

        This is `data.max_length`, or the task's own limit, but never more than the model's number
        of positions.
        """
        wanted = max_length(self.config)
        return wanted if self.positions is None else min(wanted, self.positions)

    @property
    def positions(self) -> int | None:
        """The most tokens that the model reads; None if its config gives no number."""
        reach = getattr(self.backbone.model.config.get_text_config(), _POSITIONS, None)
        return None if reach is None else int(reach)

    def examples(self, role: str, split: str) -> tuple[Example, ...]:
        """Return the examples of a role in `split`; may be empty.

        They are those of `encoded`, in the same order.
        """
        self.encoded(role, split)
        left_out = self.encoding_reports[f"{role}/{split}"].left_out
        return fitting(self.data.parts[role].get(split, ()), left_out)

    def encoded(self, role: str, split: str) -> list[EncodedExample]:
        """Return the encoded examples of a split. Each split is encoded only once.

        Test examples are cut so that an answer still fits. Examples that do not fit even without
        their body are left out.
        """
        if (role, split) not in self._encoded:
            with self.clock.span("load"):
                rows, report = encode_part(
                    self.config,
                    self.data,
                    self.backbone.tokenizer,
                    role,
                    split,
                    self.longest,
                    self.backbone.vocabulary,
                    self.backbone.decoder_start,
                )
            self._encoded[role, split] = rows
            self.encoding_reports[f"{role}/{split}"] = report
            if report.left_out:
                self.reporter.say(f"{role} {split}: {left_out_line(report, self.longest)}")
            if report.truncated:
                self.reporter.say(f"{role} {split}: {cut_line(report, self.longest)}")
            if _is_test(role, split):
                answered = rows[: self.config.evaluate.limit]
                capped = capped_line(answered, new_tokens(self.config, role, split))
                if capped:
                    self.reporter.say(f"{role} {split}: {capped}")
        return self._encoded[role, split]

    def on_all_labels(self) -> "Context":
        """Return a context whose target train set holds all labelled examples; dev is empty."""
        parts = self.data.parts["target"]
        train = tuple(example for split in LABELLED for example in parts.get(split, ()))
        return self.on_target({"train": train})

    def judged_by(self, splits: Sequence[str]) -> "Context":
        """Return a context whose target dev set holds the examples of these splits."""
        parts = self.data.parts["target"]
        dev = tuple(example for split in splits for example in parts.get(split, ()))
        return self.on_target({"train": parts.get("train", ()), "dev": dev})

    def on_target(self, labelled: Mapping[str, tuple[Example, ...]]) -> "Context":
        """Return a context with other labelled target examples; the test examples are the same.

        Extra rows that share an id or a text with train examples that become dev examples are left
        out: nothing else of the target may be like them.

        Args:
            labelled: "train", "dev" or "micro_dev" -> examples; a split that is missing is empty.
        """
        parts = self.data.parts["target"]
        kept = {name: rows for name, rows in parts.items() if name not in LABELLED}
        changed = {"target": kept | dict(labelled)}
        extra, trained = self.data.parts.get("extra"), {e.id for e in parts.get("train", ())}
        held = [example for example in labelled.get("dev", ()) if example.id in trained]
        if extra is not None and held:
            threshold = self.config.data.near_duplicates
            changed["extra"] = {"train": without_held(extra["train"], held, threshold)}
        same = self.data.parts.keys() - changed.keys()
        return Context(
            self.config,
            replace(self.data, parts=self.data.parts | changed),
            self.backbone,
            self.task,
            self.reporter,
            self.clock,
            self.on_saved,
            {k: v for k, v in self.encoding_reports.items() if k.partition("/")[0] in same},
            {k: v for k, v in self._encoded.items() if k[0] in same},
        )

    def end_id(self, role: str, split: str) -> int:
        """Return the id of the token that ends an answer of a split; in a chat it ends the turn."""
        self.encoded(role, split)
        return self.encoding_reports[f"{role}/{split}"].end_id

    def prediction(self, role: str, split: str, text: str) -> str:
        """Return the part of a generated text that is scored as the answer."""
        self.encoded(role, split)
        return self.task.clean(self.encoding_reports[f"{role}/{split}"].answer_in(text))

    def rows(self, role: str, splits: Sequence[str]) -> EncodedExamples:
        """Return the encoded examples of the splits in a form that losses are measured on."""
        encoded = [e for split in splits for e in self.encoded(role, split)]
        longest = max((len(row.input_ids) for row in encoded), default=0)
        return EncodedExamples(
            encoded,
            self.collator,
            self.config.evaluate.batch_size,
            forward_tokens(self.backbone.device),
            share_prefix=can_share_prefix(self.backbone.model, longest),
        )

    @contextmanager
    def live(
        self,
        merged: Mapping[str, MergedModule],
        mask_unit: str,
        dropout: float = 0.0,
        scaling: float = 1.0,
    ) -> Iterator[LiveAdapter]:
        """Attach an adapter to the backbone for the body of the `with`, and detach it afterwards.

        Args:
            merged: module name -> merged factors.
            mask_unit: "source" masks the factors of each source apart, "merged" all together.
            dropout: dropout of the adapter, a probability.
            scaling: factor on what the adapter adds to the backbone.
        """
        structure = self.config.structure
        with self.clock.span("load"):
            live = attach_live_adapter(
                self.backbone.model, merged, mask_unit, dropout, scaling, structure
            )
        try:
            yield live
        finally:
            live.model.unload()  # type: ignore[operator]

    def norms(self, live: LiveAdapter, importance: str) -> Mapping[str, Any] | None:
        """Return what an importance rule needs, from one pass over the target train examples.

        Args:
            live: the adapter, attached to the backbone.
            importance: the importance rule.

        Returns:
            The argument `measured` of `training.live.block_importance`, such as the input norms of
            each module; None if the rule needs nothing.
        """
        if importance not in READS_ROWS:
            return None
        with self.clock.span("masks"):
            return self._measured(live, importance)

    def _measured(self, live: LiveAdapter, importance: str) -> Mapping[str, Any]:
        blank = [block for block, _, b in live.effective_blocks() if is_blank(b)]
        if blank:
            self.reporter.say(
                f"{len(blank)} of {len(live.blocks)} mask units have B all zero (first:"
                f" {blank[0].module}); the {importance} rule is blind there, magnitude is used"
            )
        # The search, the final run and the baselines start from the same merge, so the train
        # examples are read once for all of them.
        key = importance, live.digest()
        if key not in self._norms_known:
            self._norms_known[key] = self._read(live, importance)
        found = self._norms_known[key]
        modules = {block.module for block in live.blocks if block.a in found} | found.keys()
        unread = [name for name in live.layers if name not in modules]
        if unread:
            self.reporter.say(
                f"{len(unread)} of {len(live.layers)} adapted modules get no input from the train"
                f" examples (first: {unread[0]}); magnitude is used there"
            )
        return found

    def _read(self, live: LiveAdapter, importance: str) -> Mapping[str, Any]:
        """Read the train examples for an importance rule."""
        if importance in NEEDS_GRADIENTS:
            # Row by row, because a backward pass takes more memory than a measured batch.
            rows, size = self.encoded("target", "train"), self.config.evaluate.batch_size
            steps = (
                [self.collator([row]) for row in rows[at : at + size]]
                for at in range(0, len(rows), size)
            )
            return averages_over(live, importance, steps)
        train = replace(self.rows("target", ["train"]), share_prefix=False)
        batches = [batch for _, batch in train.batches(range(len(train.encoded)))]
        if importance == "obs":
            moments = input_moments(live.model, live.layers, batches)
            return {name: Curvature.of(one) for name, one in moments.items()}
        return input_norms(live.model, live.layers, batches)


POOLS: dict[str, tuple[str, ...]] = {
    "micro-dev": ("micro_dev",),
    "micro-dev+dev": ("micro_dev", "dev"),
}
"""`controller.probe_rows` -> the splits of the target examples that probes are drawn from."""
LABELLED = ("train", "dev", "micro_dev")
"""Splits of the labelled target examples that may be trained on."""
_POSITIONS = "max_position_embeddings"


def max_length(config: RunConfig) -> int:
    """Return the most tokens that the prompt and the answer of an example have together."""
    return config.data.max_length or task_named(config.data.task).max_length


def new_tokens(config: RunConfig, role: str, split: str) -> int:
    """Return the most tokens that are generated as the answer to an example of a split.

    Raises:
        ValueError: `evaluate.min_new_tokens` is more than that.
    """
    language, given = section_of(config, role, split).language, config.evaluate
    most = given.max_new_tokens or task_named(config.data.task).new_tokens(language)
    if given.min_new_tokens > most:
        raise ValueError(
            f"evaluate.min_new_tokens: {given.min_new_tokens} is more than the {most} tokens an"
            " answer may have (evaluate.max_new_tokens); lower the first or raise the second"
        )
    return most


def _is_test(role: str, split: str) -> bool:
    return role == "tests" or split == "test"


def part_encoding(
    config: RunConfig,
    tokenizer: Any,
    role: str,
    split: str,
    longest: int | None = None,
    decoder_start: int | None = None,
) -> Encoding:
    """Return how a run encodes the examples of a split; the arguments are those of `encode_part`.

    Raises:
        ValueError: as in `Encoding` and `new_tokens`.
    """
    section = section_of(config, role, split)
    return Encoding(
        task_named(config.data.task),
        tokenizer,
        longest or max_length(config),
        section.prompt,
        for_training=not _is_test(role, split),
        chat=config.data.chat,
        new_tokens=new_tokens(config, role, split),
        decoder_start=decoder_start,
    )


def part_rows(
    config: RunConfig,
    data: RunData,
    encoding: Encoding,
    role: str,
    split: str,
    vocabulary: int | None = None,
) -> Iterator[EncodedExample]:
    """Yield the encoded examples of a split; few of them are held at a time.

    Args:
        config: the run's settings.
        data: the examples.
        encoding: that of `part_encoding`; it counts the rows.
        role: see `encode_part`.
        split: see `encode_part`.
        vocabulary: see `encode_part`.

    Raises:
        ValueError: as in `encode_part`; that too many do not fit is raised after the last one.
    """
    for row in encoding.rows(data.parts[role].get(split, ())):
        if vocabulary is not None:
            where = f"row {shown(row.id)} of {role}/{split}"
            used = (*row.sides.start, *row.input_ids)
            check_tokens(used, encoding.tokenizer, vocabulary, where)
        yield row
    report = encoding.report()
    lost = len(report.left_out)
    if lost and lost / (lost + report.rows) > config.data.max_faulty:
        raise ValueError(
            f"{role} {split}: {left_out_line(report, encoding.max_length)}; at most "
            f"{100 * config.data.max_faulty:.3g}% may be (data.max_faulty); raise data.max_length "
            "as far as the model reads, or shorten the prompt"
        )


def encode_part(
    config: RunConfig,
    data: RunData,
    tokenizer: Any,
    role: str,
    split: str,
    longest: int | None = None,
    vocabulary: int | None = None,
    decoder_start: int | None = None,
) -> tuple[list[EncodedExample], EncodingReport]:
    """Return the encoded examples of a split, as the run encodes them, and a report on it.

    Args:
        config: the run's settings.
        data: the examples.
        tokenizer: the backbone's tokenizer.
        role: "source", "target", "extra" or "tests".
        split: the split, or the name of a further test set.
        longest: the most tokens of an example; None takes `max_length(config)`.
        vocabulary: rows of the model's embedding; None if they are not known.
        decoder_start: as in `Encoding`.

    Raises:
        ValueError: as in `Encoding`, more examples than `data.max_faulty` allows do not fit even
            without their body, or as in `check_tokens` if `vocabulary` is given.
    """
    encoding = part_encoding(config, tokenizer, role, split, longest, decoder_start)
    rows = list(part_rows(config, data, encoding, role, split, vocabulary))
    return rows, encoding.report()


def fitting(examples: Sequence[Example], left_out: Collection[str]) -> tuple[Example, ...]:
    """Return the examples that are encoded, without those whose ids are `left_out`."""
    gone = frozenset(left_out)
    return tuple(example for example in examples if example.id not in gone)


def left_out_line(report: EncodingReport, length: int) -> str:
    """Return a line on how many examples do not fit, even without the part that may be cut."""
    lost = len(report.left_out)
    return (
        f"{lost} of {lost + report.rows} rows left out, such as {shown(report.left_out[0])}: they "
        f"do not fit {length} tokens even without what may be cut; the longest takes "
        f"{report.needed}"
    )


def cut_line(report: EncodingReport, length: int) -> str:
    """Return a line on how many contexts were cut, by how much, and how many answers were lost."""
    lost = f"; {report.answers_lost} answers were cut off with it" if report.answers_lost else ""
    return (
        f"{report.truncated} of {report.rows} contexts cut to fit {length} tokens"
        f" ({report.cut_tokens_total} tokens, {report.cut_share:.0%} of each on average){lost}"
    )


def capped_line(rows: Sequence[EncodedExample], limit: int) -> str | None:
    """Return a line on how many first references are longer than an answer can be; None if none.

    Args:
        rows: the encoded test examples.
        limit: the most tokens of an answer.
    """
    # The end token need not be generated.
    lengths = [row.label_tokens - 1 for row in rows]
    longer = sum(length > limit for length in lengths)
    if not longer:
        return None
    return (
        f"{longer} of {len(rows)} references are longer than the {limit} new tokens an answer may"
        f" have (evaluate.max_new_tokens), the longest {max(lengths)}: their scores are capped;"
        " raise it"
    )


def model_spec(config: RunConfig) -> ModelSpec:
    """Return the backbone settings of a run."""
    return ModelSpec(**config.model.model_dump())


def template_given(config: RunConfig, inputs: Sequence[Path] = ()) -> GivenTemplate | None:
    """Return the chat template that adapters of a run bring along; None if prompts need none.

    Args:
        config: the run's settings; its adapters may bring one.
        inputs: further adapters; theirs goes first.

    Raises:
        ValueError: a tokenizer file beside an adapter is damaged.
    """
    if not config.data.chat:
        return None
    named = [folder for folder in config.adapters.folders().values() if folder is not None]
    return given_template([*named, *inputs])


_WITHOUT = {
    "logits_to_keep": "logits are computed for the whole length, which costs time and memory",
    "position_ids": "examples are padded on the left, so losses may depend on the batch",
}


def planned_memory(config: RunConfig) -> MemoryPlan:
    """Return the memory planned for the training stage that needs most; no weights are loaded."""
    rank = config.lora.r * (2 if config.merge.kind in SUMMED_RANKS else 1)
    return plan_memory(
        model_spec(config),
        rank=rank,
        batch_size=max(config.training(name).batch_size for name in get_args(TrainingName)),
        length=max_length(config),
    )


def open_context(
    config: RunConfig,
    quiet: bool = False,
    data: RunData | None = None,
    training: bool = True,
    clock: Clock | None = None,
    inputs: Sequence[Path] = (),
) -> Context:
    """Read the examples, load the backbone, and return the context.

    The examples are read first, so that faults in them are found before a model is loaded.

    Args:
        config: the run's settings.
        quiet: print nothing.
        data: the examples, if they have been read already.
        training: False plans no memory for training.
        clock: measures the time from here on; None makes a new clock.
        inputs: adapters beside those of `config` whose chat template is used.

    Raises:
        ValueError: the examples or the backbone cannot be used; the message says what to do.
    """
    join(config)
    reporter, clock = Reporter(quiet or not is_main()), clock or Clock()
    with clock.span("load"):
        data = data or load_run_data(config, reporter.say, training=training)
        for notice in prompt_notices(config, data):
            reporter.say(notice)
        if training:
            reporter.say(f"memory planned: {planned_memory(config)}")
        template = template_given(config, inputs)
        backbone = load_backbone(model_spec(config), reporter.say)
        for notice in put_template(backbone.tokenizer, template):
            reporter.say(notice)
        if template is not None:
            backbone = replace(backbone, given_template=template.text)
    if backbone.encoder_decoder:
        _check_languages(config, data, backbone)
        return Context(config, data, backbone, task_named(config.data.task), reporter, clock)
    missing = [
        a for a in ("logits_to_keep", "position_ids") if not forward_accepts(backbone.model, a)
    ]
    for argument in missing:
        reporter.say(f"{backbone.public_name} takes no {argument}: {_WITHOUT[argument]}")
    return Context(config, data, backbone, task_named(config.data.task), reporter, clock)


def _check_languages(config: RunConfig, data: RunData, backbone: Backbone) -> None:
    """Check that an encoder-decoder can begin an answer in every language of the examples.

    Raises:
        ValueError: as in `Encoding`.
    """
    start = backbone.decoder_start
    for role, parts in data.parts.items():
        for split in parts:
            encoding = part_encoding(config, backbone.tokenizer, role, split, None, start)
            encoding.sides(section_of(config, role, split).language)


def prompt_notices(config: RunConfig, data: RunData) -> list[str]:
    """Return a line for every language that has no prompt of its own and gets the English one."""
    task = task_named(config.data.task)
    sections = [
        section_of(config, role, split) for role in data.parts for split in data.parts[role]
    ]
    languages = dict.fromkeys(s.language for s in sections if s.prompt is None)
    notices = (template_for(task, language)[1] for language in languages)
    return [notice for notice in notices if notice]
