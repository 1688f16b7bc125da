"""The ratio search in anybody's training script, as one callback of `transformers.Trainer`."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from grasp_lora.adapters.folder import write_adapter
from grasp_lora.base.files import damage, damage_words
from grasp_lora.base.words import shown, shown_path
from grasp_lora.core.controller.rounds import (
    ControllerConfig,
    RatioChoice,
    RoundRecord,
    planned_rounds,
)
from grasp_lora.core.evidence.verdict import Verdict
from grasp_lora.core.pruning.importance import IMPORTANCE, NEEDS_NORMS
from grasp_lora.models.example_losses import EncodedExamples, forward_tokens
from grasp_lora.models.modules import base_fingerprint, forward_accepts
from grasp_lora.models.token_rows import Collate, RightPadding, token_row
from grasp_lora.training.activations import input_norms
from grasp_lora.training.adopt import MASK_UNITS, adopt_adapter
from grasp_lora.training.checkpoint import (
    MARKER_FILE,
    LiveAdapterState,
    Stateful,
    read_state,
    write_state,
)
from grasp_lora.training.live import LiveAdapter
from grasp_lora.training.search_callback import Log, ProbePool, SearchCallback, SearchSettings
from grasp_lora.training.trainer import refuse_unsupported_launch

RowObjective = Callable[[nn.Module, Sequence[Any]], Sequence[float]]
"""(model in eval mode, rows) -> objective of each row; lower is better."""


@dataclass(frozen=True)
class _Opaque:
    """A row that only the user's objective can read."""

    group: str


class RatioSearch(TrainerCallback):
    """Learns how much of a LoRA adapter to prune while any Trainer trains it.

    Give it to `transformers.Trainer` or `trl.SFTTrainer` as one of their callbacks:

        search = RatioSearch(micro_dev_rows)
        Trainer(model, args, train_dataset=rows, callbacks=[search]).train()
        search.save("final")

    A few times during the training it measures the losses of the rows under masks of several
    ratios, and prunes the adapter at the ratio that is best so far. When the training ends, the
    adapter is pruned at the ratio that all measurements speak for. Loss, collator, optimizer and
    schedule are the Trainer's own. The probes change nothing but the mask: no weight, no gradient,
    no random number.

    The loss of a row is the mean cross-entropy over its tokens with a label, in nats.

    The state of the search is part of every checkpoint of the Trainer, so
    `train(resume_from_checkpoint=True)` goes on with it. With `load_best_model_at_end` the best
    checkpoint's adapter is pruned.

    The adapter must be plain LoRA on linear layers of a PeftModel. Training by several processes,
    FSDP, DeepSpeed and hyperparameter searches are refused.

    Args:
        micro_dev_rows: the rows to measure on, which must not be trained on: a `datasets.Dataset`
            or a list of mappings with `input_ids`, `labels` (-100 where there is no loss) and
            perhaps `attention_mask`. Rows without `labels` go through the Trainer's own data
            collator. A column `group` names rows that share a context.
        controller: how the ratio is searched.
        importance: score by which entries are kept or pruned: `activation`, which reads the rows
            once to measure the inputs of the layers, or `magnitude`.
        mask_unit: `merged` prunes each tensor as a whole; `source` prunes the part of each source
            adapter separately, in a model of `grasp_lora.merge_adapters`.
        adapter: name of the adapter; None means the active one.
        objective: replaces the loss: (model in eval mode, rows) -> a number for each row; lower is
            better. The rows may then be anything; `activation` still needs tokenised ones.
        seed: seed of the search's own random numbers; None takes that of the Trainer.

    Raises:
        ValueError: an argument is wrong; the message says which. What depends on the model is
            checked when the training begins.
    """

    def __init__(
        self,
        micro_dev_rows: Iterable[Any],
        *,
        controller: ControllerConfig = ControllerConfig(),
        importance: Literal["activation", "magnitude"] = "activation",
        mask_unit: Literal["merged", "source"] = "merged",
        adapter: str | None = None,
        objective: RowObjective | None = None,
        seed: int | None = None,
    ):
        for name, value, known in (
            ("importance", importance, ("activation", "magnitude")),
            ("mask_unit", mask_unit, MASK_UNITS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {shown(value)}; choose one of {', '.join(known)}")
        if controller.reward != "loss":
            raise ValueError(
                f"controller.reward is {shown(controller.reward)}, which a run of grasp-lora "
                "computes; give a function here: RatioSearch(rows, objective=...)"
            )
        self._given = _listed(micro_dev_rows, opaque=objective is not None)
        self._config, self._importance, self._mask_unit = controller, importance, mask_unit
        self._adapter, self._objective, self._seed = adapter, objective, seed
        self._live: LiveAdapter | None = None
        self._searcher: SearchCallback | None = None
        self._parts: list[Stateful] = []
        self._choice: RatioChoice | None = None
        self._log: Log | None = None

    @property
    def choice(self) -> RatioChoice:
        """The chosen ratio with its evidence.

        Raises:
            ValueError: no training with this search has ended.
        """
        if self._choice is None:
            raise ValueError(
                "no training with this search has ended: give it to a Trainer (callbacks=[search]) "
                "and call train()"
            )
        return self._choice

    @property
    def ratio(self) -> float:
        """The fraction of the adapter's entries that was pruned at the end, in [0, 1)."""
        return self.choice.ratio

    @property
    def verdict(self) -> Verdict:
        """`learned` if a gain of the ratio was shown, `flat` if not, `never-fired` without rounds.

        `never-fired` happens if the training stops before the first round.
        """
        return self.choice.verdict

    @property
    def rounds(self) -> tuple[RoundRecord, ...]:
        """The records of the rounds so far."""
        return () if self._searcher is None else self._searcher.controller.records

    def log_to(self, log: Log) -> None:
        """Hand the numbers of every round to a function: `trainer.log` brings them to its trackers.

        Args:
            log: is called with `grasp/ratio`, `grasp/incumbent`, `grasp/best`, `grasp/reward`,
                `grasp/loss`, `grasp/mu`, `grasp/sigma` and `grasp/flipped`, those that are finite.
        """
        self._log = log
        if self._searcher is not None:
            self._searcher.log = log

    def save(self, folder: str | Path) -> Path:
        """Write the adapter, pruned at the learned ratio, as an ordinary PEFT folder.

        Entries that were trained away from zero after the search are set to zero again. Model and
        tokenizer are not written.

        Args:
            folder: the folder; an adapter that is there is replaced.

        Returns:
            The folder.

        Raises:
            ValueError: no training with this search has ended, or `folder` is a file.
        """
        choice, live, folder = self.choice, self._live, Path(folder)
        assert live is not None, "a search that has a choice has an adapter"
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{shown_path(folder)} is a file; give a folder for the adapter")
        live.zero_pruned()
        model: Any = live.model
        factors, scaling = _with_one_scaling(live)
        return write_adapter(
            folder,
            factors,
            model=model,
            base_name=model.peft_config[live.adapter].base_model_name_or_path or None,
            fingerprint=base_fingerprint(model),
            extra={"ratio": choice.ratio, "verdict": choice.verdict},
            scaling=scaling,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check everything and take hold of the adapter; after a resume, load the search's state.

        Raises:
            ValueError: the launch, the model, the adapter, the rows or the checkpoint cannot be
                used.
        """
        _refuse_training(args, state)
        planned = planned_rounds(state.max_steps, self._config)
        if planned == 0:
            raise ValueError(
                f"the training has {state.max_steps} optimizer steps, too few for one round of the "
                "ratio search: train longer, or set rounds or interval of ControllerConfig lower"
            )
        if self._live is not None:
            self._live.release()
        self._choice = None
        live = adopt_adapter(kwargs["model"], self._adapter, self._mask_unit)
        self._live = live
        rows = self._rows(args, live.model, kwargs.get("train_dataloader"))
        seed = args.seed if self._seed is None else self._seed
        begun = _Begun(self._facts(rows, state.max_steps, seed, live.adapter))
        folder = _checkpoint(args, state) if state.global_step else None
        if folder is None:
            begun.norms = self._measured_norms(live, rows)
        else:
            _check_checkpoint(folder)
            read_state(folder, [begun])
        self._searcher = SearchCallback(
            live,
            ProbePool(rows, fresh=self._config.probe_rows != "micro-dev"),
            SearchSettings(
                self._config,
                IMPORTANCE[self._importance],
                begun.norms or None,
                seed=seed,
                total_steps=state.max_steps,
                planned_rounds=planned,
            ),
            on_round=lambda _state, _record: None,
            objective=None if self._objective is None else self._measure,
        )
        self._searcher.log = self._log
        self._parts = [begun, LiveAdapterState(live), self._searcher]
        if folder is not None:
            _resume(folder, live, self._parts)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set pruned entries to zero."""
        self._running()[0].zero_pruned()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Run a round if one is due."""
        self._running()[1].on_step_end(args, state, control, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the state of the search into the checkpoint that the Trainer has just written."""
        write_state(_checkpoint(args, state), self._parts)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune the adapter, or that of the best checkpoint, at the chosen ratio."""
        live, searcher = self._running()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = Path(state.best_model_checkpoint)
            _check_checkpoint(best)
            read_state(best, [LiveAdapterState(live)])
        choice = searcher.choose()
        searcher.cut(choice.ratio)
        live.release()
        self._choice = choice

    def _running(self) -> tuple[LiveAdapter, SearchCallback]:
        if self._live is None or self._searcher is None:
            raise ValueError(
                "this search was added after the training began; add it before train() is called"
            )
        return self._live, self._searcher

    def _rows(self, args: Any, model: nn.Module, dataloader: Any) -> EncodedExamples:
        """Return the rows in the form that losses are measured on."""
        padding = RightPadding(forward_accepts(model, "logits_to_keep"))
        batch_size = args.per_device_eval_batch_size
        if self._objective is not None and not _tokenised(self._given[0]):
            if self._importance in NEEDS_NORMS:
                raise ValueError(
                    f"importance={self._importance!r} measures the layers' inputs on the rows, "
                    "which are not tokenised: give tokenised rows, or set importance='magnitude'"
                )
            groups = [_Opaque(str(place)) for place in range(len(self._given))]
            return EncodedExamples(groups, padding, batch_size)
        collate = _collator_of(dataloader)
        rows = [token_row(row, i, model, collate) for i, row in enumerate(self._given)]
        return EncodedExamples(rows, padding, batch_size, forward_tokens(args.device))

    def _measure(self, model: nn.Module, drawn: Sequence[int]) -> list[float]:
        """Return the user's objective of the rows at these places."""
        assert self._objective is not None
        with torch.no_grad():
            found: Any = self._objective(model, [self._given[place] for place in drawn])
        values = found.tolist() if hasattr(found, "tolist") else list(found)
        if len(values) != len(drawn):
            raise ValueError(
                f"objective returned {len(values)} values for {len(drawn)} rows; it must return "
                "one number for each row, in their order"
            )
        return [float(value) for value in values]

    def _measured_norms(self, live: LiveAdapter, rows: EncodedExamples) -> dict[str, Tensor]:
        if self._importance not in NEEDS_NORMS:
            return {}
        batches = rows.batches(range(len(rows.encoded)))
        return input_norms(live.model, live.layers, [batch for _, batch in batches])

    def _facts(self, rows: EncodedExamples, steps: int, seed: int, name: str) -> dict[str, Any]:
        """Return what a resumed search must have in common with the one that was begun."""
        content = [asdict(row) for row in rows.encoded]
        return {
            "micro_dev_rows": hashlib.sha256(json.dumps(content).encode()).hexdigest(),
            "controller": asdict(self._config),
            "importance": self._importance,
            "mask_unit": self._mask_unit,
            "adapter": name,
            "seed": seed,
            "steps": steps,
        }


class _Begun:
    """What a search began with: facts that must stay the same, and the input norms."""

    name = "begun"

    def __init__(self, facts: Mapping[str, Any]):
        self._facts = facts
        self.norms: dict[str, Tensor] = {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return norms and facts."""
        return self.norms, dict(self._facts)

    def load_state(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Load the norms.

        Raises:
            ValueError: the search was begun with other facts.
        """
        differ = [name for name, value in self._facts.items() if values.get(name) != value]
        if differ:
            raise ValueError(
                f"training resumes a ratio search that was begun with other {', '.join(differ)}: "
                "give the same, or begin the training again"
            )
        self.norms = dict(tensors)


def _listed(rows: Iterable[Any], opaque: bool) -> list[Any]:
    """Return the rows as a list.

    Raises:
        ValueError: there are none, or they are not mappings although they are to be read here.
    """
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise ValueError(
            f"micro_dev_rows is a {type(rows).__name__}, but must be a list of rows or a "
            "datasets.Dataset (of a DatasetDict give one split)"
        )
    given = list(rows)
    if not given:
        raise ValueError("micro_dev_rows is empty; the search needs rows to measure on")
    odd = next((row for row in given if not isinstance(row, Mapping)), None)
    if odd is not None and not opaque:
        raise ValueError(
            f"micro_dev_rows holds {shown(odd)}; a row must be a mapping with input_ids and labels"
        )
    return given


def _tokenised(row: Any) -> bool:
    return isinstance(row, Mapping) and "input_ids" in row


def _collator_of(dataloader: Any) -> Collate | None:
    """Return the collator of a Trainer's dataloader, for the columns that the Trainer gives it."""
    collate = getattr(dataloader, "collate_fn", None)
    if collate is None:
        return None
    columns = getattr(dataloader.dataset, "column_names", None)

    def collated(rows: list[Any]) -> Mapping[str, Any]:
        kept = [{n: v for n, v in row.items() if columns is None or n in columns} for row in rows]
        return collate(kept)

    return collated


def _refuse_training(args: Any, state: Any) -> None:
    """Refuse a training that the search cannot follow.

    Raises:
        ValueError: it is distributed, or one of a hyperparameter search.
    """
    refuse_unsupported_launch(args.device.type == "cpu")
    if args.fsdp or args.deepspeed or args.world_size > 1:
        raise ValueError(
            "RatioSearch runs in a single process on one device; FSDP, DeepSpeed and several "
            "processes are not supported: launch without them"
        )
    if state.is_hyper_param_search:
        raise ValueError(
            "RatioSearch does not run within trainer.hyperparameter_search: search the "
            "hyperparameters first, then train once with RatioSearch"
        )


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _check_checkpoint(folder: Path) -> None:
    """Check that a checkpoint holds the whole state of a search.

    Raises:
        ValueError: it holds none, or a file of it was changed.
    """
    if not (folder / MARKER_FILE).is_file():
        raise ValueError(
            f"{shown_path(folder)} holds no state of a ratio search ({MARKER_FILE}): it was "
            "written without RatioSearch, cut short, or lies outside output_dir; resume from an "
            "earlier checkpoint in output_dir, or begin the training again"
        )
    wrong = damage(folder / MARKER_FILE)
    if wrong:
        raise ValueError(
            f"{shown_path(folder)} is damaged ({damage_words(wrong)}); resume from an earlier "
            "checkpoint"
        )


def _resume(folder: Path, live: LiveAdapter, parts: Sequence[Stateful]) -> None:
    """Load the state of a search, which must belong to the weights that the Trainer loaded.

    Raises:
        ValueError: the Trainer loaded another checkpoint.
    """
    loaded = live.digest()
    read_state(folder, parts)
    if live.digest() != loaded:
        raise ValueError(
            f"the training resumed from other weights than those in {shown_path(folder)}; "
            "resume from a checkpoint in output_dir (resume_from_checkpoint=True)"
        )


def _with_one_scaling(live: LiveAdapter) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """Return the factors and the scaling that all modules share.

    Where the modules have several scalings, each is multiplied into its B.
    """
    scalings = {name: float(layer.scaling[live.adapter]) for name, layer in live.layers.items()}
    plain = live.plain_factors()
    if len(set(scalings.values())) == 1:
        return plain, next(iter(scalings.values()))
    return {name: (a, b * scalings[name]) for name, (a, b) in plain.items()}, 1.0
