"""Inputs of LoRA modules over a data set: the size of each feature, and all second moments."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

Batch = Mapping[str, Tensor]
Statistic = Callable[[Tensor], Tensor]
"""Inputs of a module, float32 [tokens, in] -> what is summed over batches."""

_DECODER = "decoder_"
"""How the names of a decoder's tensors begin in a batch of an encoder-decoder."""


def input_norms(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Return the L2 norm of each input feature of each module, over all tokens of `batches`.

    The norms are n_j of the `activation` importance. Padding is excluded. If a module reads every
    token of a batch, as [batch, length, in] or [batch * length, in], the batch's `attention_mask`
    tells the padding. Otherwise (an expert reads only some tokens) the examples of the batch are
    read again one by one, without padding. The model runs in eval mode and gets its modes back.

    In an encoder-decoder the modules of the encoder read the tokens of prompts, and so do those of
    the decoder that look at its output. The others read what the decoder is given, its start
    included, and `decoder_attention_mask` tells the padding. They are told apart by the length;
    where both lengths of a batch are the same, its examples are read one by one.

    Args:
        model: the model with active adapters.
        modules: name -> LoRA layer whose input is measured.
        batches: collated batches with `input_ids` and `attention_mask` [batch, length], and for an
            encoder-decoder `decoder_input_ids` and `decoder_attention_mask`.

    Returns:
        name -> float32 tensor [in_features] on the CPU, without modules that read no token.
    """
    sums = _summed(model, modules, batches, lambda inputs: inputs.square().sum(0))
    return {name: total.sqrt().cpu() for name, total in sums.items()}


def input_moments(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """Return the second moments of the inputs of each module, summed over all tokens of `batches`.

    Everything else is as in `input_norms`, whose squares are the diagonal.

    Returns:
        name -> float32 tensor [in_features, in_features] on the CPU, without modules that read no
        token.
    """
    sums = _summed(model, modules, batches, lambda inputs: inputs.T @ inputs)
    return {name: total.cpu() for name, total in sums.items()}


@torch.no_grad()
def _summed(
    model: nn.Module, modules: Mapping[str, nn.Module], batches: Iterable[Batch], of: Statistic
) -> dict[str, Tensor]:
    """Return name -> sum of a statistic over the tokens of all batches."""
    sums: dict[str, Tensor] = {}
    device = next(model.parameters()).device
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for batch in batches:
            moved = {k: v.to(device) for k, v in batch.items() if k != "labels"}
            found = _of_batch(model, modules, moved, of)
            if found is not None:
                _add(sums, found)
                continue
            for part in _by_example(model, modules, moved, of):
                _add(sums, part)
    finally:
        for module, training in modes:
            module.training = training
    return sums


def _of_batch(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch, of: Statistic
) -> dict[str, Tensor] | None:
    """Return name -> statistic of a batch; None if the padding in a module's input is unknown."""
    masks = list(_masks(batch).values())
    sums: dict[str, Tensor] = {}
    unknown: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            real = _real_tokens(inputs[0], masks)
            if real is None:
                unknown.append(name)
            elif real.numel():
                _add(sums, {name: of(real.float())})

        return hook

    handles = [m.register_forward_pre_hook(watch(name)) for name, m in modules.items()]
    try:
        model(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return None if unknown else sums


def _masks(batch: Batch) -> dict[str, Tensor]:
    """Return beginning of the names of a side's tensors -> its mask; a causal model has one."""
    name = "attention_mask"
    sides = ("", _DECODER) if f"{_DECODER}{name}" in batch else ("",)
    return {side: batch[f"{side}{name}"].bool() for side in sides}


def _real_tokens(inputs: Tensor, masks: Sequence[Tensor]) -> Tensor | None:
    """Return the inputs [tokens, in] without padding, or None if the padding is unknown."""
    if all(mask.all() for mask in masks):
        return inputs.flatten(0, -2)
    fits = [mask for mask in masks if inputs.shape[:-1] in (mask.shape, (mask.numel(),))]
    if not fits or any(not torch.equal(mask, fits[0]) for mask in fits):
        return None
    return inputs.flatten(0, -2)[fits[0].flatten()]


def _by_example(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch, of: Statistic
) -> Iterator[dict[str, Tensor]]:
    masks = _masks(batch)
    # The batch's logit positions include the padding. The logits are not used, so keep only one.
    last = torch.tensor([-1], device=masks[""].device)
    kept = {"logits_to_keep": last} if "logits_to_keep" in batch else {}
    for index in range(len(masks[""])):
        example: dict[str, Tensor] = {}
        for name, values in batch.items():
            mask = masks[_DECODER if name.startswith(_DECODER) else ""]
            if values.shape == mask.shape:
                example[name] = values[index, mask[index]][None]
        found = _of_batch(model, modules, example | kept, of)
        assert found is not None, "an example without padding has only real tokens"
        yield found


def _add(sums: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    for name, one in more.items():
        sums[name] = sums[name] + one if name in sums else one
