"""Check that a model has an embedding for the tokens that it is given."""

from collections.abc import Iterable
from typing import Any

from grasp_lora.base.words import shown


def check_tokens(ids: Iterable[int], tokenizer: Any, vocabulary: int, where: str) -> None:
    """Check that every token has a row in the embedding.

    A tokenizer may have more tokens than the model, for instance if some were added and the
    embedding was not resized. That is no fault as long as none of them is used.

    Args:
        ids: the tokens that are used.
        tokenizer: the tokenizer that they are of.
        vocabulary: rows of the model's input embedding.
        where: what holds the tokens, for the message.

    Raises:
        ValueError: a token has no row.
    """
    highest = max(ids, default=0)
    if highest >= vocabulary:
        raise ValueError(
            f"{where} has the token {shown(tokenizer.convert_ids_to_tokens(highest))} with id "
            f"{highest}, but the model's embedding has {vocabulary} rows (ids 0 to "
            f"{vocabulary - 1}); give the tokenizer that belongs to the model, or call "
            "model.resize_token_embeddings(len(tokenizer)) and save both"
        )
