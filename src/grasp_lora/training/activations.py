"""Input norms: how strongly each input feature of a LoRA module fires over a data set."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]


@torch.no_grad()
def input_norms(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Return, per module, the L2 norm of each input feature over all tokens of `batches`.

    The norms are n_j of the `activation` importance. Padding is left out: by the batch's
    `attention_mask` where a module reads every token of it, as [batch, length, in] or as
    [batch * length, in]; else (an expert that some tokens are routed to) the rows of the batch are
    read again one by one, without padding. The model runs in eval mode and gets its modes back.

    Args:
        model: the model to run, adapters active.
        modules: name -> LoRA layer whose input is measured.
        batches: collated batches with `input_ids` and `attention_mask` [batch, length].

    Returns:
        name -> float32 tensor [in_features] on the CPU. Modules that read no token are left out.
    """
    sums: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for batch in batches:
            moved = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            found = _squares(model, modules, moved)
            for part in [found] if found is not None else _row_by_row(model, modules, moved):
                _add(sums, part)
    finally:
        for module, training in modes:
            module.training = training
    return {name: total.sqrt().cpu() for name, total in sums.items()}


def _squares(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch
) -> dict[str, Tensor] | None:
    """Return name -> summed squares [in]; None if a module's padding cannot be told."""
    mask = batch["attention_mask"].bool()
    sums: dict[str, Tensor] = {}
    unplaced: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            real = _real_tokens(inputs[0], mask)
            if real is None:
                unplaced.append(name)
            elif real.numel():
                _add(sums, {name: real.float().square().sum(0)})

        return hook

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in modules.items()]
    try:
        model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return None if unplaced else sums


def _real_tokens(inputs: Tensor, mask: Tensor) -> Tensor | None:
    """Return the inputs [tokens, in] that are no padding, None if that cannot be told."""
    if inputs.shape[:-1] in (mask.shape, (mask.numel(),)):
        return inputs.flatten(0, -2)[mask.flatten()]
    return inputs.flatten(0, -2) if mask.all() else None


def _row_by_row(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch
) -> Iterator[dict[str, Tensor]]:
    mask = batch["attention_mask"].bool()
    # Positions whose logits are kept count from the padding on; none of them is looked at here.
    last = torch.tensor([-1], device=mask.device)
    kept = {"logits_to_keep": last} if "logits_to_keep" in batch else {}
    for index, real in enumerate(mask):
        row = {k: v[index, real][None] for k, v in batch.items() if v.shape == mask.shape}
        found = _squares(model, modules, row | kept)
        assert found is not None, "a row without padding has only real tokens"
        yield found


def _add(sums: dict[str, Tensor], squares: Mapping[str, Tensor]) -> None:
    for name, found in squares.items():
        sums[name] = sums[name] + found if name in sums else found
