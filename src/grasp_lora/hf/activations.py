"""Input norms: how strongly each input feature of a LoRA module fires over a data set."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def input_norms(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return, per module, the L2 norm of each input feature over all tokens of `batches`.

    The norms are n_j of the `activation` importance. Padding is left out by the batch's
    `attention_mask`. The model runs in eval mode and gets its modes back.

    Args:
        model: the model to run, adapters active.
        modules: name -> LoRA layer whose input is measured.
        batches: collated batches with `input_ids` and `attention_mask` [batch, length].

    Returns:
        name -> float32 tensor [in_features] on the CPU.
    """
    sums: dict[str, Tensor] = {}
    current: list[Tensor] = []

    def watch(name: str):
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            real = inputs[0][current[0]]  # [tokens, in]
            squares = real.float().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    modes = [(m, m.training) for m in model.modules()]
    handles = [m.register_forward_pre_hook(watch(name)) for name, m in modules.items()]
    device = next(model.parameters()).device
    try:
        model.eval()
        for batch in batches:
            moved = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            current[:] = [moved["attention_mask"].bool()]
            model(**moved, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return {name: total.sqrt().cpu() for name, total in sums.items()}
