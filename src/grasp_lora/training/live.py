"""The live adapter: the only place that writes the weights of a training LoRA adapter.

Every trainable LoRA tensor is cut into *blocks*, the tensors a prune ratio applies to (mask units):
the whole tensor (`merged`), or the part of it that came from one source adapter (`source`). A
pruned entry is exactly zero in the weights; its last value waits in a stash, so that it is scored
by that value and can come back with it.

Memory beside the weights: the stash (a value for each pruned entry) and masks of one bit an entry.
A trial writes only the entries it changes and keeps only the values it takes away; every entry's
value is held once in all.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from grasp_lora.adapters.attach import adapter_modules, attach_adapter
from grasp_lora.core.lora import MergedModule
from grasp_lora.core.pruning.importance import magnitude
from grasp_lora.core.pruning.masks import STRUCTURES, Mask, packed_size
from grasp_lora.models.preserve import preserved

Masks = Mapping[str, Mask]
"""Name of a parameter -> its keep mask."""

ImportanceRule = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""An entry of `core.importance.IMPORTANCE`."""

BlockImportance = Callable[["Block", Tensor, Tensor], tuple[Tensor, Tensor]]
"""(block, its A [r, in], its B [out, r]) -> importance of their entries; see `block_importance`."""


class SumOfSources(nn.Module):
    """Presents factors that are trained apart as the one tensor a plain LoRA layer multiplies.

    Args:
        parts: the factors to start from; their sum is the layer's tensor.
    """

    def __init__(self, parts: list[Tensor]):
        super().__init__()
        self._parts = parts

    def forward(self, *sources: Tensor) -> Tensor:
        """Return the sum of the sources' factors."""
        return torch.stack(sources).sum(0)

    def right_inverse(self, value: Tensor) -> tuple[Tensor, ...]:
        """Return the parts to start from, on the device and in the dtype of `value`."""
        return tuple(p.to(value) for p in self._parts)


@dataclass(frozen=True)
class Block:
    """One mask unit's pair of tensors: A and B of one module, of one source or of all.

    Attributes:
        module: full name of the LoRA layer in the bare model.
        source: index of the source adapter, None when the unit is the merged tensor.
        a, b: names of the parameters (keys of `LiveAdapter.params`).
        rows: which rows of `a` (and columns of `b`) belong to the block.
    """

    module: str
    source: int | None
    a: str
    b: str
    rows: slice


BlockRatio = Callable[[Block], float]
"""Block -> fraction of its entries that is removed."""


class LiveAdapter:
    """Handles on the trainable tensors of one LoRA adapter, their masks and their stash.

    Args:
        model: the PeftModel.
        params: name -> trainable tensor; A tensors are [rank, in], B tensors [out, rank].
        blocks: the mask units that cover them.
        layers: module name -> LoRA layer, for input norms.
        structure: what a ratio removes, a key of `core.masks.STRUCTURES`.
    """

    def __init__(
        self,
        model: nn.Module,
        params: dict[str, nn.Parameter],
        blocks: tuple[Block, ...],
        layers: Mapping[str, Any],
        structure: str = "entries",
    ):
        self._cut_both = STRUCTURES[structure]
        self.model = model
        self.params = params
        self.blocks = blocks
        self.layers = layers
        self._keep: dict[str, Mask] = {}
        self._stash: dict[str, Tensor] = {}
        for name, param in params.items():
            param.register_hook(self._gradient_filter(name))

    def _gradient_filter(self, name: str):
        # Filtering as the gradient arrives, not after the backward pass, keeps pruned entries out
        # of the norm that clipping divides by and out of Adam's moments.
        def keep_only(gradient: Tensor) -> Tensor | None:
            if not self.any_pruned(name):
                return None
            return gradient.masked_fill(~self.keep(name), 0.0)

        return keep_only

    def any_pruned(self, name: str) -> bool:
        """Return whether the tensor has a pruned entry."""
        return name in self._keep

    def keep(self, name: str) -> Tensor:
        """Return the tensor's keep mask, True = kept (a copy)."""
        if self.any_pruned(name):
            return self._keep[name].keep()
        return torch.ones_like(self.params[name], dtype=torch.bool)

    def effective(self, name: str) -> Tensor:
        """Return the tensor with every pruned entry at its stashed value; read it only."""
        value = self.params[name].detach()
        if not self.any_pruned(name):
            return value
        return value.masked_scatter(~self.keep(name), self._stash[name])

    def effective_blocks(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Yield (block, A [r, in], B [out, r]) with stashed values in place; read them only."""
        for (name_a, name_b), blocks in groupby(self.blocks, key=lambda block: (block.a, block.b)):
            a, b = self.effective(name_a), self.effective(name_b)
            for block in blocks:
                yield block, a[block.rows], b[:, block.rows]

    def masks(
        self,
        score: Callable[[Block, Tensor, Tensor], tuple[Tensor, Tensor]],
        ratios: Sequence["float | BlockRatio"],
    ) -> list[Masks]:
        """Return for each ratio the masks that prune it of every block's tensors.

        One pass over the adapter: importance is computed once for all ratios, and only one
        module's is held at a time.

        Args:
            score: importance of a block's A [r, in] and B [out, r]; see `block_importance`.
            ratios: fractions removed, in [0, 1]; a function gives each block its own.
        """
        cut: list[dict[str, Mask]] = [{} for _ in ratios]
        places = self._places_for_bits(len(ratios))
        scored_blocks = ((block, *score(block, a, b)) for block, a, b in self.effective_blocks())
        for names, group in groupby(scored_blocks, key=lambda item: (item[0].a, item[0].b)):
            drafts = [
                tuple(torch.empty_like(self.params[n], dtype=torch.bool) for n in names)
                for _ in ratios
            ]
            for block, score_a, score_b in group:
                own = [ratio(block) if callable(ratio) else ratio for ratio in ratios]
                found = self._cut_both(score_a, score_b, own)
                for (keep_a, keep_b), (found_a, found_b) in zip(drafts, found, strict=True):
                    keep_a[block.rows] = found_a
                    keep_b[:, block.rows] = found_b
            for masks, draft, place in zip(cut, drafts, places, strict=True):
                masks |= {n: Mask.of(k, place[n]) for n, k in zip(names, draft, strict=True)}
        return list(cut)

    def _places_for_bits(self, count: int) -> list[dict[str, Tensor]]:
        """Return room for the bits of so many masks, one piece of memory each, as `_room`."""
        sizes = [packed_size(p.numel()) for p in self.params.values()]
        device = next(iter(self.params.values())).device
        wholes = [torch.empty(sum(sizes), dtype=torch.uint8, device=device) for _ in range(count)]
        return [dict(zip(self.params, whole.split(sizes), strict=True)) for whole in wholes]

    @contextmanager
    def trial(self, masks: Masks) -> Iterator[None]:
        """Run the body under `masks` in eval mode, then put everything back as it was.

        Put back, also after an exception: the entries that the masks changed, gradients, every
        module's train or eval mode and every random generator. Entries that a mask keeps but that
        are pruned now take part with their stashed value.

        Raises:
            RuntimeError: the body wrote to the weights, which it may not.
        """
        with torch.no_grad():
            places = self._room({n: int(self._leaving(n, masks).sum()) for n in self.params})
        applied: list[str] = []
        try:
            for name in self.params:
                self._apply(name, masks, places[name])
                applied.append(name)
            with preserved(self.model, self.params):
                self.model.eval()
                yield
        finally:
            for name in applied:
                self._undo(name, masks, places[name])

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Run the body as a `trial` with nothing pruned, then put the masks back."""
        kept = {
            name: Mask.of(torch.ones_like(param, dtype=torch.bool))
            for name, param in self.params.items()
        }
        with self.trial(kept):
            yield

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Run the body in eval mode with the adapter's contribution multiplied, then restore.

        A factor of 0 gives the bare backbone, one below 1 shrinks what the adapter adds. What is
        put back is that of `trial`.

        Raises:
            RuntimeError: the body wrote to the weights, which it may not.
        """
        before = {name: layer.scaling["default"] for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.scaling["default"] = before[name] * factor
            with preserved(self.model, self.params):
                self.model.eval()
                yield
        finally:
            for name, layer in self.layers.items():
                layer.scaling["default"] = before[name]

    def _leaving(self, name: str, masks: Masks) -> Tensor:
        """Return which entries are in the weights now and go under `masks`."""
        wanted = masks[name].keep()
        return self.keep(name) & ~wanted if self.any_pruned(name) else ~wanted

    def _room(self, counts: Mapping[str, int]) -> dict[str, Tensor]:
        """Return room for so many values of each tensor, all in one piece of memory.

        What lives long and is made a piece at a time between large short-lived tensors scatters
        over the heap, which then holds far more than is in use.
        """
        param = next(iter(self.params.values()))
        whole = torch.empty(sum(counts.values()), dtype=param.dtype, device=param.device)
        return dict(zip(counts, whole.split(list(counts.values())), strict=True))

    @torch.no_grad()
    def _apply(self, name: str, masks: Masks, place: Tensor) -> None:
        """Put `masks` in force, mask and stash untouched; the values that go move to `place`."""
        param, leaving = self.params[name], self._leaving(name, masks)
        torch.masked_select(param, leaving, out=place)
        if self.any_pruned(name):
            wanted, pruned = masks[name].keep(), ~self.keep(name)
            back = torch.masked_select(self._stash[name], torch.masked_select(wanted, pruned))
            param.masked_scatter_(wanted & pruned, back)
        param.masked_fill_(leaving, 0.0)

    @torch.no_grad()
    def _undo(self, name: str, masks: Masks, place: Tensor) -> None:
        param = self.params[name]
        param.masked_scatter_(self._leaving(name, masks), place)
        if self.any_pruned(name):
            param.masked_fill_(~self.keep(name), 0.0)

    @torch.no_grad()
    def commit(self, masks: Masks, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Make `masks` the adapter's masks; return how many entries changed side.

        Newly pruned entries are stashed and their moments cleared in every optimizer-state tensor
        of the parameter's shape (never the shared step counter); revived ones return from the
        stash.
        """
        flipped = 0
        for name, param in self.params.items():
            wanted = masks[name].keep()
            flipped += int((self.keep(name) ^ wanted).sum())
            if optimizer is not None:
                _clear_moments(optimizer, param, self._leaving(name, masks))
            if self.any_pruned(name):  # all values go back first: old and new stash never coexist
                param.masked_scatter_(~self.keep(name), self._stash[name])
        self._keep, self._stash = {}, {}
        counts = {n: int((~masks[n].keep()).sum()) for n in self.params}
        for name, place in self._room({n: count for n, count in counts.items() if count}).items():
            self._apply(name, masks, place)
            self._keep[name], self._stash[name] = masks[name], place
        return flipped

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Set pruned entries to zero again (momentum and weight decay move them)."""
        for name, param in self.params.items():
            if self.any_pruned(name):
                param.masked_fill_(~self.keep(name), 0.0)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of names and weights, zeros of pruned entries included."""
        digest = hashlib.sha256()
        for name, param in self.params.items():
            digest.update(f"{name}{tuple(param.shape)}{param.dtype}".encode())
            digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def held_bytes(self) -> int:
        """Return the memory of masks and stash, in bytes."""
        return sum(self._keep[n].bits.nbytes + self._stash[n].nbytes for n in self._keep)

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of weights, masks (bits) and stash, on the CPU."""
        out: dict[str, Tensor] = {}
        for name, param in self.params.items():
            out[f"weight.{name}"] = param.detach().cpu().clone()
            if self.any_pruned(name):
                out[f"keep.{name}"] = self._keep[name].bits.cpu().clone()
                out[f"stash.{name}"] = self._stash[name].cpu().clone()
        return out

    @torch.no_grad()
    def load(self, snapshot: Mapping[str, Tensor]) -> None:
        """Take over a `snapshot` of an adapter of the same layout."""
        self._keep.clear()
        self._stash.clear()
        for name, param in self.params.items():
            param.copy_(snapshot[f"weight.{name}"])
            if f"keep.{name}" in snapshot:
                self._keep[name] = Mask(snapshot[f"keep.{name}"].to(param.device), param.shape)
                self._stash[name] = snapshot[f"stash.{name}"].to(param.device)

    def plain_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return module -> (A, B) as a plain LoRA layer holds them, on the CPU."""
        return {
            name: (
                layer.lora_A["default"].weight.detach().cpu().clone(),  # type: ignore[union-attr]
                layer.lora_B["default"].weight.detach().cpu().clone(),  # type: ignore[union-attr]
            )
            for name, layer in self.layers.items()
        }


def _clear_moments(optimizer: torch.optim.Optimizer, param: Tensor, entries: Tensor) -> None:
    for state in optimizer.state.get(param, {}).values():
        if isinstance(state, Tensor) and state.shape == param.shape:
            state.masked_fill_(entries, 0)


def block_importance(rule: ImportanceRule, norms: Mapping[str, Tensor] | None) -> BlockImportance:
    """Return the scores of blocks by a rule, for `LiveAdapter.masks`.

    Args:
        rule: an entry of `core.importance.IMPORTANCE`.
        norms: module name -> input norms [in], or None for rules that need none. A module that
            is not among them reads no text, so its inputs say nothing: magnitude is used there.
    """

    def score(block: Block, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if norms is None:
            return rule(a, b, None)
        if block.module not in norms:
            return magnitude(a, b, None)
        return rule(a, b, norms[block.module].to(a.device))

    return score


def attach_live_adapter(
    model: nn.Module,
    merged: Mapping[str, MergedModule],
    mask_unit: str,
    dropout: float = 0.0,
    scaling: float = 1.0,
    structure: str = "entries",
) -> LiveAdapter:
    """Attach a merged adapter to a bare model, trainable, and return the handles on it.

    Args:
        model: the bare causal LM; its own weights stay frozen.
        merged: module name -> merged factors.
        mask_unit: `source` masks what came from each adapter for itself, `merged` masks the
            merged tensors as one.
        dropout: LoRA dropout.
        scaling: the layers' LoRA scaling; 1 for merged factors, which carry theirs inside.
        structure: what a ratio removes, a key of `core.masks.STRUCTURES`.

    Raises:
        ValueError: `mask_unit` is unknown, or is `source` for an `svd` merge, which mixes the
            sources.
    """
    if mask_unit not in ("source", "merged"):
        raise ValueError(f"mask_unit must be 'source' or 'merged', got {mask_unit!r}")
    mixed = [n for n, m in merged.items() if m.kind == "svd"]
    if mask_unit == "source" and mixed:
        raise ValueError(
            f"mask_unit 'source' is not possible after an svd merge ({mixed[0]}): its factors mix"
            " the sources. Set mask_unit: merged, or merge with kind cat or linear."
        )
    plain = {name: (m.A, m.B) for name, m in merged.items()}
    peft_model = attach_adapter(model, plain, dropout=dropout)
    layers = adapter_modules(peft_model)
    for layer in layers.values():
        layer.scaling["default"] = scaling
    params: dict[str, nn.Parameter] = {}
    blocks: list[Block] = []
    for name, module in merged.items():
        blocks += _cut(name, module, layers[name], mask_unit, params)
    return LiveAdapter(peft_model, params, tuple(blocks), layers, structure)


def _cut(
    name: str, module: MergedModule, layer: Any, mask_unit: str, params: dict[str, nn.Parameter]
) -> list[Block]:
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    if mask_unit == "source" and module.kind == "linear" and len(module.parts) > 1:
        parametrize.register_parametrization(a, "weight", SumOfSources([p.A for p in module.parts]))
        parametrize.register_parametrization(b, "weight", SumOfSources([p.B for p in module.parts]))
        blocks: list[Block] = []
        for i, part in enumerate(module.parts):
            block = Block(
                name, part.source, f"{name}.A.{part.source}", f"{name}.B.{part.source}", slice(None)
            )
            params[block.a] = getattr(a.parametrizations.weight, f"original{i}")
            params[block.b] = getattr(b.parametrizations.weight, f"original{i}")
            blocks.append(block)
        return blocks
    params[f"{name}.A"], params[f"{name}.B"] = a.weight, b.weight
    whole = Block(name, None, f"{name}.A", f"{name}.B", slice(None))
    if mask_unit == "merged" or module.kind == "svd":
        return [whole]
    if len(module.parts) == 1:
        return [Block(name, module.parts[0].source, whole.a, whole.b, slice(None))]
    blocks = []
    start = 0
    for part in module.parts:
        stop = start + part.A.shape[0]
        blocks.append(Block(name, part.source, whole.a, whole.b, slice(start, stop)))
        start = stop
    return blocks
