"""What all tests share: one thread, no work that no test looks at, the builders of `helpers`."""

import functools
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import jinja2
import pytest
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import helpers

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Let PEFT's own use of a deprecated transformers name pass."""
    config.addinivalue_line(
        "filterwarnings", "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
    )


SLOW_FOLDERS = ("plans", "workbench")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the slow files where several workers share them, so that they end together."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.parent.name not in SLOW_FOLDERS)


def pytest_collection_finish() -> None:
    """Keep what is imported by now out of every later search for garbage."""
    freeze()


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """Do so for what earlier files have imported as they ran."""
    freeze()


def freeze() -> None:
    """Take all objects there are for no garbage.

    The Trainer searches for garbage before it trains. With torch and transformers loaded that is
    half a second each time, many times what the steps of a tiny model take.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep every process off the user's cache, and off that of the other processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRASP_LORA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def card_parsed_once() -> Iterator[None]:
    """Parse the template of PEFT's README once: it is written anew with every checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jinja2, "Template", functools.cache(jinja2.Template))
        yield


@pytest.fixture(scope="module", autouse=True)
def undrawn() -> Iterator[None]:
    """Leave an empty file for each picture: every run ends with some, and few tests look at any."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda _figure, path, **_: Path(path).touch())
        yield


@pytest.fixture
def drawing() -> Iterator[None]:
    """Draw the pictures of this test after all."""
    with helpers.drawing():
        yield


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
