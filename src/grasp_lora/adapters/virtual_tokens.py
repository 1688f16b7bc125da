"""Prompt tuning and its kin, so that a row's result does not depend on the rows beside it.

PEFT puts the learned virtual tokens before the padding of a left-padded batch and drops the
positions, so the distance between virtual tokens and text grows with the padding; and it leaves
`logits_to_keep` as it is, although every position moves by the number of virtual tokens. Here they
stand right before the text of each row, which is what PEFT does for a row without padding.
"""

from typing import Any, cast

import torch
from peft import PeftModelForCausalLM, PeftType, PromptLearningConfig
from torch import Tensor

from grasp_lora.models.modules import forward_accepts

VIRTUAL_TOKEN_TYPES = (PeftType.PROMPT_TUNING, PeftType.P_TUNING)
"""The adapter types that put embeddings before the text. Prefix tuning does not: it fills the
cache, where padding does no harm once positions are given."""


class VirtualTokenModel(PeftModelForCausalLM):
    """A causal LM with prompt tuning whose batches may be padded on the left."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: Tensor | int | None = None,
        **settings: Any,
    ) -> Any:
        """Return the model's output for `input_ids` [B, L], with logits for these L positions.

        Args:
            input_ids: padded on the left.
            attention_mask: [B, L]; None means no padding.
            position_ids: ignored, as the virtual tokens move them; made from the mask.
            logits_to_keep: which of the L positions get logits; for models that know it.
            settings: for the base model.
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
        """Return `input_ids` [B, L] and the new tokens, as transformers' `generate` does."""
        embeddings, mask = self._extended(input_ids, attention_mask)
        return self.base_model.generate(  # type: ignore[operator]
            input_ids=input_ids, inputs_embeds=embeddings, attention_mask=mask, **settings
        )

    @property
    def _virtual_tokens(self) -> int:
        return cast(PromptLearningConfig, self.active_peft_config).num_virtual_tokens  # type: ignore[return-value]

    def _extended(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return embeddings [B, L + V, width] and mask [B, L + V], V the virtual tokens."""
        rows, length = ids.shape
        virtual = self._virtual_tokens
        padding = torch.zeros(rows, 1, dtype=torch.long, device=ids.device)
        if mask is not None:
            padding = length - mask.long().sum(1, keepdim=True)
            if not mask.bool().equal(torch.arange(length, device=ids.device) >= padding):
                raise ValueError("pad the rows on the left: virtual tokens stand before the text")
        # Counted from the first virtual token of the row; padding is negative.
        place = torch.arange(length + virtual, device=ids.device) - padding  # [B, L + V]
        source = torch.where(place < 0, place, place - virtual) + padding
        texts = self.word_embeddings(ids.gather(1, source.clamp(0, length - 1)))  # type: ignore[misc]
        prompts = self.get_prompt(rows).to(texts.dtype)  # [B, V, width]
        index = place.clamp(0, virtual - 1).unsqueeze(2).expand(-1, -1, texts.shape[2])
        is_virtual = ((place >= 0) & (place < virtual)).unsqueeze(2)
        return torch.where(is_virtual, prompts.gather(1, index), texts), (place >= 0).long()
