"""Virtual tokens in left-padded batches, where an example's result does not depend on its batch.

PEFT puts the learned virtual tokens before the padding and drops the positions, so padding
separates virtual tokens from text. PEFT also leaves `logits_to_keep` unchanged, although virtual
tokens shift every position. Here the virtual tokens stand directly before the text of each example,
as PEFT places them for an example without padding.

A learned prefix of keys and values fills the cache instead, where padding does no harm if positions
are given. PEFT passes that cache under a name that newer releases of transformers ignore as they
generate.
"""

from typing import Any, cast

import torch
from peft import PeftModelForCausalLM, PeftType, PromptLearningConfig
from torch import Tensor

from grasp_lora.models.key_values import CACHE_NAME, cache_argument
from grasp_lora.models.modules import forward_accepts

VIRTUAL_TOKEN_TYPES = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
"""Adapter types that put embeddings before the text."""

PREFIX_TYPES = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
"""Adapter types that put keys and values before the text."""


def _virtual_tokens(model: PeftModelForCausalLM) -> int:
    config = cast(PromptLearningConfig, model.active_peft_config)
    return config.num_virtual_tokens  # type: ignore[return-value]


class VirtualTokenModel(PeftModelForCausalLM):
    """A causal LM with prompt tuning that accepts left-padded batches."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: Tensor | int | None = None,
        **settings: Any,
    ) -> Any:
        """Return the model's output, with logits for the L positions of `input_ids` only.

        Args:
            input_ids: [B, L], padded on the left.
            attention_mask: [B, L]; None means no padding.
            position_ids: ignored; positions with virtual tokens are computed from the mask.
            logits_to_keep: which of the L positions get logits, for models with this argument.
            settings: further arguments for the base model.
        """
        del position_ids
        embeddings, mask = self._extended(input_ids, attention_mask)
        virtual = _virtual_tokens(self)
        if forward_accepts(self, "position_ids"):
            settings["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        if logits_to_keep is not None:
            shift = virtual if isinstance(logits_to_keep, Tensor) else 0
            settings["logits_to_keep"] = logits_to_keep + shift
        output = self.base_model(inputs_embeds=embeddings, attention_mask=mask, **settings)
        if logits_to_keep is None:
            output.logits = output.logits[:, virtual:]
        return output

    def generate(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any
    ) -> Any:
        """Return `input_ids` [B, L] followed by the new tokens, like transformers' `generate`."""
        embeddings, mask = self._extended(input_ids, attention_mask)
        return self.base_model.generate(  # type: ignore[operator]
            input_ids=input_ids, inputs_embeds=embeddings, attention_mask=mask, **settings
        )

    def _extended(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return embeddings [B, L + V, width] and mask [B, L + V] for V virtual tokens."""
        examples, length = ids.shape
        virtual = _virtual_tokens(self)
        padding = torch.zeros(examples, 1, dtype=torch.long, device=ids.device)
        if mask is not None:
            padding = length - mask.long().sum(1, keepdim=True)
            if not mask.bool().equal(torch.arange(length, device=ids.device) >= padding):
                raise ValueError(
                    "the batch must be padded on the left: virtual tokens precede the text"
                )
        # Position relative to the example's first virtual token; negative in the padding.
        place = torch.arange(length + virtual, device=ids.device) - padding  # [B, L + V]
        source = torch.where(place < 0, place, place - virtual) + padding
        texts = self.word_embeddings(ids.gather(1, source.clamp(0, length - 1)))  # type: ignore[misc]
        prompts = self.get_prompt(examples).to(texts.dtype)  # [B, V, width]
        index = place.clamp(0, virtual - 1).unsqueeze(2).expand(-1, -1, texts.shape[2])
        is_virtual = ((place >= 0) & (place < virtual)).unsqueeze(2)
        return torch.where(is_virtual, prompts.gather(1, index), texts), (place >= 0).long()


class PrefixModel(PeftModelForCausalLM):
    """A causal LM with a learned prefix of keys and values that accepts left-padded batches."""

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any
    ) -> Any:
        """Return the model's output for `input_ids` [B, L] after the prefix.

        Args:
            input_ids: [B, L], padded on the left.
            attention_mask: [B, L]; None means no padding.
            settings: further arguments for the base model; `position_ids` count from the text.
        """
        settings = self._with_prefix(settings, input_ids.shape[0], attention_mask)
        settings[str(cache_argument(self))] = self.get_prompt(input_ids.shape[0])
        return self.base_model(input_ids=input_ids, **settings)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the base model's inputs of a step of `generate`, after the prefix.

        `generate` reads in the name `kwargs` that all arguments of the model's forward are taken.
        """
        inputs = self.base_model_prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[operator]
        examples, cache = inputs["input_ids"].shape[0], inputs.get(CACHE_NAME)
        inputs |= self._with_prefix(inputs, examples, inputs.get("attention_mask"))
        if cache is None or not cache.get_seq_length():
            inputs[CACHE_NAME] = self.get_prompt(examples)
        return inputs

    def _with_prefix(
        self, settings: dict[str, Any], examples: int, mask: Tensor | None
    ) -> dict[str, Any]:
        """Return settings whose mask and positions, where they have any, count the prefix too."""
        virtual = _virtual_tokens(self)
        extended: dict[str, Any] = {"attention_mask": mask}
        if mask is not None:
            seen = mask.new_ones(examples, virtual)
            extended["attention_mask"] = torch.cat([seen, mask], dim=1)
        if settings.get("position_ids") is not None:
            extended["position_ids"] = settings["position_ids"] + virtual
        return settings | extended
