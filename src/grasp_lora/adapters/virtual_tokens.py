"""Prompt tuning in left-padded batches, where an example's result does not depend on its batch.

PEFT puts the learned virtual tokens before the padding and drops the positions, so padding
separates virtual tokens from text. PEFT also leaves `logits_to_keep` unchanged, although virtual
tokens shift every position. Here the virtual tokens stand directly before the text of each example,
as PEFT places them for an example without padding.
"""

from typing import Any, cast

import torch
from peft import PeftModelForCausalLM, PeftType, PromptLearningConfig
from torch import Tensor

from grasp_lora.models.modules import forward_accepts

VIRTUAL_TOKEN_TYPES = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
"""Adapter types that put embeddings before the text.

Prefix tuning fills the cache instead, where padding does no harm if positions are given.
"""


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
        virtual = self._virtual_tokens
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

    @property
    def _virtual_tokens(self) -> int:
        return cast(PromptLearningConfig, self.active_peft_config).num_virtual_tokens  # type: ignore[return-value]

    def _extended(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return embeddings [B, L + V, width] and mask [B, L + V] for V virtual tokens."""
        examples, length = ids.shape
        virtual = self._virtual_tokens
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
