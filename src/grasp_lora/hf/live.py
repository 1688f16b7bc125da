"""The live adapter: the only place that writes the weights of a training LoRA adapter.

Every trainable LoRA tensor is cut into *blocks*, the tensors a prune ratio applies to (mask units):
the whole tensor (`merged`), or the part of it that came from one source adapter (`source`). A
pruned entry is exactly zero in the weights; its last value waits in a stash, so that it is scored
by that value and can come back with it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from grasp_lora.core.lora import MergedModule
from grasp_lora.core.masks import keep_at, rank_entries
from grasp_lora.hf.attach import adapter_modules, attach_adapter
from grasp_lora.hf.preserve import preserved

Masks = Mapping[str, Tensor]
Score = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]


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


class LiveAdapter:
    """Handles on the trainable tensors of one LoRA adapter, their masks and their stash.

    Args:
        model: the PeftModel.
        params: name -> trainable tensor; A tensors are [rank, in], B tensors [out, rank].
        blocks: the mask units that cover them.
        layers: module name -> LoRA layer, for input norms.
    """

    def __init__(
        self,
        model: nn.Module,
        params: dict[str, nn.Parameter],
        blocks: tuple[Block, ...],
        layers: Mapping[str, Any],
    ):
        self.model = model
        self.params = params
        self.blocks = blocks
        self.layers = layers
        self.keep: dict[str, Tensor] = {
            n: torch.ones_like(p, dtype=torch.bool) for n, p in params.items()
        }
        self.stash: dict[str, Tensor] = {n: p.data.new_empty(0) for n, p in params.items()}
        for name, param in params.items():
            param.register_hook(self._gradient_filter(name))

    def _gradient_filter(self, name: str):
        # Filtering as the gradient arrives, not after the backward pass, keeps pruned entries out
        # of the norm that clipping divides by and out of Adam's moments.
        def keep_only(gradient: Tensor) -> Tensor | None:
            return gradient.masked_fill(~self.keep[name], 0.0) if self.any_pruned(name) else None

        return keep_only

    def any_pruned(self, name: str) -> bool:
        """Return whether the tensor has a pruned entry."""
        return self.stash[name].numel() > 0

    def effective(self, name: str) -> Tensor:
        """Return the tensor with every pruned entry at its stashed value (a copy)."""
        value = self.params[name].detach().clone()
        if self.any_pruned(name):
            value[~self.keep[name]] = self.stash[name]
        return value

    def effective_blocks(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """Yield (block, A [r, in], B [out, r]) with stashed values in place."""
        values = {name: self.effective(name) for name in self.params}
        for block in self.blocks:
            yield block, values[block.a][block.rows], values[block.b][:, block.rows]

    def rank(self, score: Score, norms: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Return name -> int32 importance positions, counted within each block's own tensors.

        Args:
            score: an entry of `core.importance.IMPORTANCE`.
            norms: module name -> input norms [in], or None for rules that need none.
        """
        ranks = {n: torch.zeros_like(p, dtype=torch.int32) for n, p in self.params.items()}
        for block, a, b in self.effective_blocks():
            norm = None if norms is None else norms[block.module].to(a.device)
            score_a, score_b = score(a, b, norm)
            ranks[block.a][block.rows] = rank_entries(score_a)
            ranks[block.b][:, block.rows] = rank_entries(score_b)
        return ranks

    def masks(self, ranks: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
        """Return name -> keep masks that prune `ratio` of every block's tensors."""
        keep = {n: torch.ones_like(p, dtype=torch.bool) for n, p in self.params.items()}
        for block in self.blocks:
            keep[block.a][block.rows] = keep_at(ranks[block.a][block.rows], ratio)
            keep[block.b][:, block.rows] = keep_at(ranks[block.b][:, block.rows], ratio)
        return keep

    @contextmanager
    def trial(self, masks: Masks, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """Run the body under `masks` in eval mode, then put everything back as it was.

        Put back, also after an exception: weights, gradients, the optimizer's state (when given),
        every module's train/eval mode and every random generator. Entries that the mask keeps but
        that are pruned now take part with their stashed value.
        """
        with preserved(self.model, self.params, optimizer):
            with torch.no_grad():
                for name, param in self.params.items():
                    param.copy_(self.effective(name).masked_fill_(~masks[name], 0.0))
            self.model.eval()
            yield

    @torch.no_grad()
    def commit(self, masks: Masks, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Make `masks` the adapter's masks; return how many entries changed side.

        Newly pruned entries are stashed and their moments cleared in every optimizer-state tensor
        of the parameter's shape (never the shared step counter); revived ones return from the
        stash.
        """
        flipped = 0
        for name, param in self.params.items():
            keep = masks[name]
            value = self.effective(name)
            newly_pruned = self.keep[name] & ~keep
            flipped += int((self.keep[name] ^ keep).sum())
            self.stash[name] = value[~keep]
            self.keep[name] = keep.clone()
            param.copy_(value.masked_fill_(~keep, 0.0))
            if optimizer is not None:
                for state in optimizer.state.get(param, {}).values():
                    if isinstance(state, Tensor) and state.shape == param.shape:
                        state.masked_fill_(newly_pruned, 0)
        return flipped

    @torch.no_grad()
    def enforce(self) -> None:
        """Set pruned entries to zero again (momentum and weight decay move them)."""
        for name, param in self.params.items():
            if self.any_pruned(name):
                param.masked_fill_(~self.keep[name], 0.0)

    def snapshot(self) -> dict[str, Tensor]:
        """Return copies of weights, masks and stash, on the CPU."""
        out: dict[str, Tensor] = {}
        for name, param in self.params.items():
            out[f"weight.{name}"] = param.detach().cpu().clone()
            out[f"keep.{name}"] = self.keep[name].cpu().clone()
            out[f"stash.{name}"] = self.stash[name].cpu().clone()
        return out

    @torch.no_grad()
    def load(self, snapshot: Mapping[str, Tensor]) -> None:
        """Take over a `snapshot` of an adapter of the same layout."""
        for name, param in self.params.items():
            param.copy_(snapshot[f"weight.{name}"])
            self.keep[name] = snapshot[f"keep.{name}"].to(param.device)
            self.stash[name] = snapshot[f"stash.{name}"].to(param.device)

    def plain(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return module -> (A, B) as a plain LoRA layer holds them, on the CPU."""
        return {
            name: (
                layer.lora_A["default"].weight.detach().cpu().clone(),  # type: ignore[union-attr]
                layer.lora_B["default"].weight.detach().cpu().clone(),  # type: ignore[union-attr]
            )
            for name, layer in self.layers.items()
        }


def go_live(
    model: nn.Module,
    merged: Mapping[str, MergedModule],
    mask_unit: str,
    dropout: float = 0.0,
    scaling: float = 1.0,
) -> LiveAdapter:
    """Attach a merged adapter to a bare model, trainable, and return the handles on it.

    Args:
        model: the bare causal LM; its own weights stay frozen.
        merged: module name -> merged factors.
        mask_unit: `source` masks what came from each adapter for itself, `merged` masks the
            merged tensors as one.
        dropout: LoRA dropout.
        scaling: the layers' LoRA scaling; 1 for merged factors, which carry theirs inside.

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
    return LiveAdapter(peft_model, params, tuple(blocks), layers)


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
