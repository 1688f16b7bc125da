"""Shared fixtures: one thread, and the builders of `helpers` under their own names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import helpers

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Let PEFT's own use of a deprecated transformers name pass."""
    config.addinivalue_line(
        "filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    )


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Return the builder of tiny random models."""
    return helpers.tiny_model


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return the byte tokenizer, shared: a test must not change it."""
    return helpers.tiny_tokenizer()


@pytest.fixture
def tiny_backbone_folder(tmp_path: Path) -> Callable[..., Path]:
    """Return a builder of backbone folders below this test's own folder."""

    def build(arch: str = "llama", **settings: object) -> Path:
        return helpers.tiny_backbone_folder(tmp_path / f"backbone-{arch}", arch, **settings)

    return build


@pytest.fixture
def tiny_adapter_folder() -> Callable[..., Path]:
    """Return the builder of adapter folders: (folder, model, r, alpha, ...) -> folder."""
    return helpers.tiny_adapter_folder
