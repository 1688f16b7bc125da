"""Rows that another trainer tokenised, as examples whose losses can be measured.

A row is read without its padding, whatever side that is on. Batches are padded on the right: in a
causal model nothing after a token changes it, so a row's loss does not depend on the rows beside
it, also where the model takes no positions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grasp_lora.base.words import shown
from grasp_lora.models.example_losses import IGNORED
from grasp_lora.models.modules import forward_accepts

Collate = Callable[[list[Any]], Mapping[str, Any]]
"""A trainer's data collator: a list of rows -> one batch of tensors."""

_UNDERSTOOD = ("input_ids", "labels", "attention_mask", "position_ids", "logits_to_keep")
_PACKED = (
    "packed rows are several examples in one; do not pack them (SFTConfig(eval_packing=False))"
)


@dataclass(frozen=True)
class TokenRow:
    """One tokenised example without padding.

    Attributes:
        input_ids: the tokens.
        labels: for each token its id, or `IGNORED` where there is no loss.
        group: examples of one group (one context) are not independent of each other.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    group: str


def token_row(
    row: Mapping[str, Any], place: int, model: nn.Module, collate: Collate | None
) -> TokenRow:
    """Return a row of a data set as a `TokenRow`.

    Args:
        row: `input_ids`, `labels` (-100 where there is no loss) and perhaps `attention_mask`, one
            value a token; without `labels` the trainer's collator makes them. A `group` names the
            group; the default is a group for each row. Columns that the model does not read are
            ignored.
        place: place of the row among the rows, from 0.
        model: the model that reads it.
        collate: the trainer's data collator; None if there is none.

    Raises:
        ValueError: the row is not tokenised, packed, has no token with a loss, or has something
            else that the model reads.
    """
    where, group = f"row {place}", str(row.get("group", place))
    if "input_ids" not in row:
        raise ValueError(
            f"{where} has {_named(row)}, but no input_ids: give tokenised rows; for rows that "
            "the trainer tokenises (SFTTrainer), give them to it as eval_dataset, make "
            "RatioSearch(trainer.eval_dataset) and call trainer.add_callback(search)"
        )
    if "seq_lengths" in row:
        raise ValueError(f"{where}: {_PACKED}")
    if "labels" not in row:
        row = _collated(row, where, collate)
    read = [name for name in row if name not in _UNDERSTOOD and forward_accepts(model, name)]
    if read:
        raise ValueError(
            f"{where} has {shown(read[0])}, which the model reads beside its tokens: leave it out, "
            "or measure the rows by a function of your own (objective=...)"
        )
    columns = {name: _values(row[name], where, name) for name in _UNDERSTOOD[:4] if name in row}
    return TokenRow(*_without_padding(columns, where), group)


def _collated(row: Mapping[str, Any], where: str, collate: Collate | None) -> Mapping[str, Any]:
    """Return a row as the trainer's collator makes it, one value a token."""
    if collate is None:
        raise ValueError(f"{where} has no labels, and there is no data collator that makes them")
    batch = dict(collate([{name: value for name, value in row.items() if name != "group"}]))
    if batch.get("labels") is None:
        raise ValueError(
            f"{where} has no labels, and the trainer's data collator makes none: give labels (-100 "
            "where there is no loss), or a collator that does, like DataCollatorForLanguageModeling"
        )
    return {
        name: value[0] if isinstance(value, Tensor) and len(value) == 1 else value
        for name, value in batch.items()
    }


def _values(column: Any, where: str, name: str) -> list[int]:
    values = column.tolist() if hasattr(column, "tolist") else column
    whole = isinstance(values, Sequence) and not isinstance(values, str)
    if not whole or not all(isinstance(value, int) for value in values):
        raise ValueError(
            f"{where}: {name} is {shown(column)}, but must be one whole number a token"
        )
    return list(values)


def _without_padding(
    columns: Mapping[str, list[int]], where: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens that count and their labels."""
    ids = columns["input_ids"]
    lengths = {name: len(values) for name, values in columns.items()}
    if set(lengths.values()) != {len(ids)}:
        raise ValueError(f"{where}: its columns must be equally long, got {lengths}")
    mask = columns.get("attention_mask", [1] * len(ids))
    kept = [i for i, real in enumerate(mask) if real]
    places = [columns["position_ids"][i] for i in kept] if "position_ids" in columns else None
    if places not in (None, [*range(len(kept))]):
        raise ValueError(f"{where}: its position_ids do not count from 0 to its end; {_PACKED}")
    labels = [columns["labels"][i] for i in kept]
    if labels:
        labels[0] = IGNORED  # nothing comes before the first token that could predict it
    if all(label == IGNORED for label in labels):
        raise ValueError(
            f"{where} has no token with a loss after its first: its labels are all {IGNORED}, or "
            "it was cut short; leave it out"
        )
    return tuple(ids[i] for i in kept), tuple(labels)


@dataclass(frozen=True)
class RightPadding:
    """Collates `TokenRow`s to one batch of int64 tensors, padded on the right.

    Attributes:
        with_logits_to_keep: False for models whose forward has no `logits_to_keep`.
    """

    with_logits_to_keep: bool

    def __call__(self, rows: Sequence[TokenRow]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` [rows, L], and `logits_to_keep` [K].

        K positions are kept: from the one that predicts the batch's first label up to L - 2.
        """
        length = max(len(row.input_ids) for row in rows)
        batch = {
            # A padding token is never read, so any id will do that every model has.
            "input_ids": torch.zeros(len(rows), length, dtype=torch.int64),
            "attention_mask": torch.zeros(len(rows), length, dtype=torch.int64),
            "labels": torch.full((len(rows), length), IGNORED, dtype=torch.int64),
        }
        for index, row in enumerate(rows):
            end = len(row.input_ids)
            batch["input_ids"][index, :end] = torch.tensor(row.input_ids)
            batch["attention_mask"][index, :end] = 1
            batch["labels"][index, :end] = torch.tensor(row.labels)
        if self.with_logits_to_keep:
            first = min(_first_label(row) for row in rows)
            batch["logits_to_keep"] = torch.arange(first - 1, length - 1)
        return batch


def _first_label(row: TokenRow) -> int:
    return next(i for i, label in enumerate(row.labels) if label != IGNORED)


def _named(row: Mapping[str, Any]) -> str:
    return shown(sorted(map(str, row)))
