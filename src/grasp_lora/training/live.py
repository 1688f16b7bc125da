"""The live adapter: a LoRA adapter in training, with masks that set pruned entries to zero.

Only this module writes pruning masks into the weights. Every trainable LoRA tensor is divided into
*blocks* (mask units), to which a ratio applies. A block is a whole tensor (`merged`) or the part of
a tensor that came from one source adapter (`source`). A pruned entry is exactly zero in the
weights. Its last value is kept in the stash: it determines the entry's importance and is restored
when the entry returns.

Besides the weights, memory holds the stash (one value for each pruned entry) and masks (one bit for
each entry). A trial changes only the entries where its mask differs, and saves only the values that
it removes. Each entry's value is held once.
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
from grasp_lora.core.pruning.importance import FITS, magnitude
from grasp_lora.core.pruning.masks import STRUCTURES, Mask, packed_size
from grasp_lora.models.preserve import preserved

Masks = Mapping[str, Mask]
"""Name of a parameter -> keep mask."""

ImportanceRule = Callable[[Tensor, Tensor, Any], tuple[Tensor, Tensor]]
"""(A, B, what was measured) -> importance of both; an entry of `importance.IMPORTANCE`."""

BlockImportance = Callable[["Block", Tensor, Tensor], tuple[Tensor, Tensor]]
"""(block, its A [r, in], its B [out, r]) -> importance of both; see `block_importance`."""

BlockFit = Callable[["Block", Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(block, its A [r, in] and B [out, r] before pruning, which of both stay) -> new A and B."""


class SumOfSources(nn.Module):
    """Parametrisation of a LoRA tensor as the sum of factors that are trained separately.

    Args:
        parts: initial factors of the sources; their sum is the layer's tensor.
    """

    def __init__(self, parts: list[Tensor]):
        super().__init__()
        self._parts = parts

    def forward(self, *sources: Tensor) -> Tensor:
        """Return the sum of the sources' factors."""
        return torch.stack(sources).sum(0)

    def right_inverse(self, value: Tensor) -> tuple[Tensor, ...]:
        """Return the initial factors, on the device and in the dtype of `value`."""
        return tuple(p.to(value) for p in self._parts)


@dataclass(frozen=True)
class Block:
    """One mask unit: A and B of one module, either of one source adapter or merged.

    Attributes:
        module: full name of the LoRA layer in the base model.
        source: index of the source adapter; None for the merged tensors.
        a: name of the parameter with A, a key of `LiveAdapter.params`.
        b: name of the parameter with B.
        rows: rows of A, and columns of B, that belong to the block.
    """

    module: str
    source: int | None
    a: str
    b: str
    rows: slice


BlockRatio = Callable[[Block], float]
"""Block -> fraction of its entries that is removed, in [0, 1]."""


class LiveAdapter:
    """The trainable tensors of one LoRA adapter, with their masks and stashed values.

    Args:
        model: the PeftModel.
        params: name -> trainable tensor; A tensors are [rank, in], B tensors [out, rank].
        blocks: the mask units, which together cover all of `params`.
        layers: module name -> LoRA layer.
        structure: unit of pruning, a key of `core.pruning.masks.STRUCTURES`.
        adapter: name of the adapter in the PeftModel.
    """

    def __init__(
        self,
        model: nn.Module,
        params: dict[str, nn.Parameter],
        blocks: tuple[Block, ...],
        layers: Mapping[str, Any],
        structure: str = "entries",
        adapter: str = "default",
    ):
        self.structure = structure
        self.adapter = adapter
        self.model = model
        self.params = params
        self.blocks = blocks
        self.layers = layers
        self._keep: dict[str, Mask] = {}
        self._stash: dict[str, Tensor] = {}
        self._watcher: Callable[[str, Tensor], None] | None = None
        self._hooks = [
            param.register_hook(self._gradient_filter(name)) for name, param in params.items()
        ]

    def release(self) -> None:
        """Let gradients pass unfiltered again, for a model that goes on without this adapter."""
        for hook in self._hooks:
            hook.remove()

    def watch_gradients(self, watcher: Callable[[str, Tensor], None] | None) -> None:
        """Show every gradient of a backward pass, of pruned entries too; None shows no more.

        Args:
            watcher: takes the name of a parameter and its gradient, which it must not write to.
        """
        self._watcher = watcher

    def _gradient_filter(self, name: str):
        # A gradient hook keeps pruned entries out of Adam's moments and out of the gradient norm
        # used for clipping. Filtering after the backward pass would come too late.
        def keep_only(gradient: Tensor) -> Tensor | None:
            if self._watcher is not None:
                self._watcher(name, gradient)
            if not self.any_pruned(name):
                return None
            return gradient.masked_fill(~self.keep(name), 0.0)

        return keep_only

    def any_pruned(self, name: str) -> bool:
        """Return whether a tensor has a pruned entry."""
        return name in self._keep

    def keep(self, name: str) -> Tensor:
        """Return a copy of a tensor's keep mask, True = kept."""
        if self.any_pruned(name):
            return self._keep[name].keep()
        return torch.ones_like(self.params[name], dtype=torch.bool)

    def effective(self, name: str) -> Tensor:
        """Return a tensor with pruned entries at their stashed values; do not write to it."""
        value = self.params[name].detach()
        if not self.any_pruned(name):
            return value
        return value.masked_scatter(~self.keep(name), self._stash[name])

    def effective_blocks(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Yield (block, A [r, in], B [out, r]) with stashed values; do not write to them."""
        for (name_a, name_b), blocks in groupby(self.blocks, key=lambda block: (block.a, block.b)):
            a, b = self.effective(name_a), self.effective(name_b)
            for block in blocks:
                yield block, a[block.rows], b[:, block.rows]

    def masks(
        self,
        importance: BlockImportance,
        ratios: Sequence["float | BlockRatio"],
    ) -> list[Masks]:
        """Return for each ratio the masks that remove that fraction of every block's tensors.

        Importance is computed in one pass for all ratios, and only one module's importance is in
        memory at a time.

        Args:
            importance: importance of a block's entries; see `block_importance`.
            ratios: fractions removed, in [0, 1], or functions that return a block's ratio.
        """
        found: list[dict[str, Mask]] = [{} for _ in ratios]
        buffers = self._mask_buffers(len(ratios))
        scored_blocks = (
            (block, *importance(block, a, b)) for block, a, b in self.effective_blocks()
        )
        for names, group in groupby(scored_blocks, key=lambda item: (item[0].a, item[0].b)):
            drafts = [
                tuple(torch.empty_like(self.params[n], dtype=torch.bool) for n in names)
                for _ in ratios
            ]
            for block, importance_a, importance_b in group:
                values = [ratio(block) if callable(ratio) else ratio for ratio in ratios]
                pairs = STRUCTURES[self.structure](importance_a, importance_b, values)
                for (keep_a, keep_b), (block_a, block_b) in zip(drafts, pairs, strict=True):
                    keep_a[block.rows] = block_a
                    keep_b[:, block.rows] = block_b
            for masks, draft, buffer in zip(found, drafts, buffers, strict=True):
                masks |= {n: Mask.of(k, buffer[n]) for n, k in zip(names, draft, strict=True)}
        return list(found)

    def _mask_buffers(self, count: int) -> list[dict[str, Tensor]]:
        """Return buffers for the bits of `count` masks, one allocation per mask; see `_buffers`."""
        sizes = [packed_size(p.numel()) for p in self.params.values()]
        device = next(iter(self.params.values())).device
        wholes = [torch.empty(sum(sizes), dtype=torch.uint8, device=device) for _ in range(count)]
        return [dict(zip(self.params, whole.split(sizes), strict=True)) for whole in wholes]

    @contextmanager
    def trial(self, masks: Masks, fit: BlockFit | None = None) -> Iterator[None]:
        """Run the body with `masks` in force and the model in eval mode, then restore everything.

        On exit, also after an exception, these are restored: the entries that the masks changed,
        gradients, train or eval modes, and random generators. An entry that is pruned now and kept
        by `masks` has its stashed value in the body.

        Args:
            masks: the masks.
            fit: gives the entries that `masks` keep other values in the body; None leaves them.

        Raises:
            RuntimeError: the body wrote to the weights.
        """
        with torch.no_grad():
            buffers = self._buffers({n: int(self._leaving(n, masks).sum()) for n in self.params})
            fitted = {} if fit is None else self._fitted(lambda n: masks[n].keep(), fit)
        applied: list[str] = []
        before: dict[str, Tensor] = {}
        try:
            for name in self.params:
                self._apply(name, masks, buffers[name])
                applied.append(name)
            for name, values in fitted.items():
                before[name] = self.params[name].detach().clone()
                self.params[name].data.copy_(values)
            with preserved(self.model, self.params):
                self.model.eval()
                yield
        finally:
            for name, values in before.items():
                self.params[name].data.copy_(values)
            for name in applied:
                self._undo(name, masks, buffers[name])

    @contextmanager
    def unpruned(self) -> Iterator[None]:
        """Run the body as a `trial` with nothing pruned, then restore the masks."""
        kept = {
            name: Mask.of(torch.ones_like(param, dtype=torch.bool))
            for name, param in self.params.items()
        }
        with self.trial(kept):
            yield

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Run the body in eval mode with the adapter's contribution times `factor`, then restore.

        A factor of 0 gives the base model. The same state is restored as by `trial`.

        Raises:
            RuntimeError: the body wrote to the weights.
        """
        before = {name: layer.scaling[self.adapter] for name, layer in self.layers.items()}
        try:
            for name, layer in self.layers.items():
                layer.scaling[self.adapter] = before[name] * factor
            with preserved(self.model, self.params):
                self.model.eval()
                yield
        finally:
            for name, layer in self.layers.items():
                layer.scaling[self.adapter] = before[name]

    @contextmanager
    def replaced(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the body in eval mode with other values in some tensors, then restore everything.

        The same state is restored as by `trial`.

        Args:
            values: name of a parameter -> values of its shape.

        Raises:
            RuntimeError: the body wrote to the weights.
        """
        before = {name: self.params[name].detach().clone() for name in values}
        try:
            for name, value in values.items():
                self.params[name].data.copy_(value)
            with preserved(self.model, self.params):
                self.model.eval()
                yield
        finally:
            for name, value in before.items():
                self.params[name].data.copy_(value)

    def _leaving(self, name: str, masks: Masks) -> Tensor:
        """Return True for the entries that are kept now and removed by `masks`."""
        wanted = masks[name].keep()
        return self.keep(name) & ~wanted if self.any_pruned(name) else ~wanted

    def _buffers(self, counts: Mapping[str, int]) -> dict[str, Tensor]:
        """Return a buffer for `counts[name]` values of each tensor, all in one allocation.

        Many long-lived buffers allocated between large short-lived tensors would fragment the heap,
        so that it takes far more memory than is in use.
        """
        param = next(iter(self.params.values()))
        whole = torch.empty(sum(counts.values()), dtype=param.dtype, device=param.device)
        return dict(zip(counts, whole.split(list(counts.values())), strict=True))

    @torch.no_grad()
    def _apply(self, name: str, masks: Masks, buffer: Tensor) -> None:
        """Write `masks` into the weights; move removed values to `buffer`; keep mask and stash."""
        param, leaving = self.params[name], self._leaving(name, masks)
        torch.masked_select(param, leaving, out=buffer)
        if self.any_pruned(name):
            wanted, pruned = masks[name].keep(), ~self.keep(name)
            revived = torch.masked_select(self._stash[name], torch.masked_select(wanted, pruned))
            param.masked_scatter_(wanted & pruned, revived)
        param.masked_fill_(leaving, 0.0)

    @torch.no_grad()
    def _undo(self, name: str, masks: Masks, buffer: Tensor) -> None:
        """Undo `_apply`."""
        param = self.params[name]
        param.masked_scatter_(self._leaving(name, masks), buffer)
        if self.any_pruned(name):
            param.masked_fill_(~self.keep(name), 0.0)

    @torch.no_grad()
    def commit(
        self,
        masks: Masks,
        optimizer: torch.optim.Optimizer | None = None,
        clear_moments: bool = True,
    ) -> int:
        """Make `masks` the adapter's masks; return the number of entries that they change.

        Newly pruned entries are stashed. Revived entries get their stashed values, and a second
        moment that is not below the mean of the entries that were kept and stay; see
        `_adjust_moments`.

        Args:
            masks: the new masks.
            optimizer: an Adam whose moments follow the masks; None if nothing was trained yet.
            clear_moments: set the first moment of newly pruned entries to zero.
        """
        flipped = 0
        for name, param in self.params.items():
            kept, wanted = self.keep(name), masks[name].keep()
            flipped += int((kept ^ wanted).sum())
            if optimizer is not None:
                _adjust_moments(optimizer.state.get(param, {}), kept, wanted, clear_moments)
            if self.any_pruned(name):  # so that old and new stash never coexist
                param.masked_scatter_(~self.keep(name), self._stash[name])
        self._keep, self._stash = {}, {}
        counts = {n: int((~masks[n].keep()).sum()) for n in self.params}
        wanted_counts = {n: count for n, count in counts.items() if count}
        for name, buffer in self._buffers(wanted_counts).items():
            self._apply(name, masks, buffer)
            self._keep[name], self._stash[name] = masks[name], buffer
        return flipped

    @torch.no_grad()
    def refit(self, fit: BlockFit) -> None:
        """Give the kept entries of every block new values; pruned ones stay zero and stashed.

        Args:
            fit: returns the values; those of pruned entries are ignored.
        """
        for name, values in self._fitted(self.keep, fit).items():
            self.params[name].copy_(values)

    def _fitted(self, keep: Callable[[str], Tensor], fit: BlockFit) -> dict[str, Tensor]:
        """Return name -> values by `fit`, zero where `keep` of the name is False."""
        found = {name: torch.zeros_like(param) for name, param in self.params.items()}
        for block, a, b in self.effective_blocks():
            keep_a, keep_b = keep(block.a)[block.rows], keep(block.b)[:, block.rows]
            new_a, new_b = fit(block, a, b, keep_a, keep_b)
            found[block.a][block.rows] = new_a.to(a) * keep_a
            found[block.b][:, block.rows] = new_b.to(b) * keep_b
        return found

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Set pruned entries to zero again, after momentum and weight decay moved them."""
        for name, param in self.params.items():
            if self.any_pruned(name):
                param.masked_fill_(~self.keep(name), 0.0)

    def digest(self) -> str:
        """Return a SHA-256 (hex) of names and weights, in which pruned entries are zero."""
        digest = hashlib.sha256()
        for name, param in self.params.items():
            digest.update(f"{name}{tuple(param.shape)}{param.dtype}".encode())
            digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def held_bytes(self) -> int:
        """Return the memory of masks and stash in bytes."""
        return sum(self._keep[n].bits.nbytes + self._stash[n].nbytes for n in self._keep)

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of weights, masks (packed bits) and stash, on the CPU."""
        out: dict[str, Tensor] = {}
        for name, param in self.params.items():
            out[f"weight.{name}"] = param.detach().cpu().clone()
            if self.any_pruned(name):
                out[f"keep.{name}"] = self._keep[name].bits.cpu().clone()
                out[f"stash.{name}"] = self._stash[name].cpu().clone()
        return out

    @torch.no_grad()
    def load(self, snapshot: Mapping[str, Tensor]) -> None:
        """Load a `snapshot` of an adapter with the same tensors and blocks."""
        self._keep.clear()
        self._stash.clear()
        for name, param in self.params.items():
            param.copy_(snapshot[f"weight.{name}"])
            if f"keep.{name}" in snapshot:
                self._keep[name] = Mask(snapshot[f"keep.{name}"].to(param.device), param.shape)
                self._stash[name] = snapshot[f"stash.{name}"].to(param.device)

    def plain_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return module -> (A, B) of the equivalent plain LoRA adapter, on the CPU."""
        return {
            name: (
                layer.lora_A[self.adapter].weight.detach().cpu().clone(),
                layer.lora_B[self.adapter].weight.detach().cpu().clone(),
            )
            for name, layer in self.layers.items()
        }


_FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
_SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum")
"""Names that torch's optimizers, and those that follow them, give to states of a tensor's shape."""


def _adjust_moments(
    state: Mapping[str, Any], kept: Tensor, wanted: Tensor, clear_first: bool
) -> None:
    """Make the moments of one tensor follow its masks; the step counter stays as it is.

    The second moment of a pruned entry only decays, and one pruned early has hardly any. Adam's
    bias correction goes by the step that all entries share, so it does not make up for that: a
    revived entry would step several times as far as its neighbours (`benchmarks.revival`).

    Optimizers that hold no such states, or in another form (8 bit, factored), keep theirs.

    Args:
        state: the optimizer's state of the tensor; empty before the first step.
        kept: the keep mask until now.
        wanted: the keep mask from now on.
        clear_first: set the first moment of the entries that are pruned now to zero.
    """

    def moments(names: Sequence[str]) -> list[Tensor]:
        found = [state[name] for name in names if isinstance(state.get(name), Tensor)]
        return [one for one in found if one.shape == kept.shape and one.is_floating_point()]

    if clear_first:
        for first in moments(_FIRST_MOMENTS):
            first.masked_fill_(kept & ~wanted, 0.0)
    revived, staying = wanted & ~kept, kept & wanted
    if bool(revived.any()) and bool(staying.any()):
        for second in moments(_SECOND_MOMENTS):
            least = torch.masked_select(second, staying).mean()
            second.copy_(torch.where(revived, second.clamp(min=least), second))


def block_importance(rule: ImportanceRule, measured: Mapping[str, Any] | None) -> BlockImportance:
    """Return the importance of blocks by a rule, for `LiveAdapter.masks`.

    Args:
        rule: an entry of `core.pruning.importance.IMPORTANCE`.
        measured: what the rule needs: name of a module -> measured on its inputs, or name of a
            parameter -> averages of its gradient; None for rules that need nothing. A module
            without it read no tokens, so its importance is the magnitude.
    """

    def importance(block: Block, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if measured is None:
            return rule(a, b, None)
        if block.a in measured and block.b in measured:
            of_a, of_b = measured[block.a], measured[block.b]
            return rule(a, b, (of_a[..., block.rows, :], of_b[..., block.rows]))
        if block.module not in measured:
            return magnitude(a, b, None)
        return rule(a, b, measured[block.module])

    return importance


def block_fit(rule: str, measured: Mapping[str, Any] | None) -> BlockFit | None:
    """Return how kept entries make up for pruned ones by a rule; None if they stay as they are.

    Args:
        rule: name of an importance rule.
        measured: as in `block_importance`. A module without it keeps its values.
    """
    fitted = FITS.get(rule)
    if fitted is None or measured is None:
        return None

    def fit(
        block: Block, a: Tensor, b: Tensor, keep_a: Tensor, keep_b: Tensor
    ) -> tuple[Tensor, Tensor]:
        if block.module not in measured:
            return a, b
        return fitted(a, b, keep_a, keep_b, measured[block.module])

    return fit


def attach_live_adapter(
    model: nn.Module,
    merged: Mapping[str, MergedModule],
    mask_unit: str,
    dropout: float = 0.0,
    scaling: float = 1.0,
    structure: str = "entries",
) -> LiveAdapter:
    """Add a merged adapter to a base model as trainable LoRA, and return it as a `LiveAdapter`.

    Args:
        model: the base causal LM without LoRA; its own weights stay frozen.
        merged: module name -> merged factors.
        mask_unit: `source` prunes the part of each source adapter separately, `merged` prunes the
            merged tensors as a whole.
        dropout: LoRA dropout.
        scaling: the layers' LoRA scaling; 1 for merged factors, which include their scaling.
        structure: unit of pruning, a key of `core.pruning.masks.STRUCTURES`.

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
        blocks += _blocks_of(name, module, layers[name], mask_unit, params)
    return LiveAdapter(peft_model, params, tuple(blocks), layers, structure)


def _blocks_of(
    name: str, module: MergedModule, layer: Any, mask_unit: str, params: dict[str, nn.Parameter]
) -> list[Block]:
    """Return the blocks of a module and add its trainable tensors to `params`."""
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
