"""What of a model's folder tells its content apart."""

from pathlib import Path

import pytest

from grasp_lora.models.backbones import ModelSpec
from grasp_lora.models.content import base_content
from helpers import tiny_adapter_folder, tiny_backbone_folder, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_backbone_folder(tmp_path / "base")


def test_an_adapter_beside_the_weights_does_not_count(folder: Path) -> None:
    before = base_content(ModelSpec(str(folder)))
    (folder / "README.md").touch()
    tiny_adapter_folder(folder, tiny_model())
    assert base_content(ModelSpec(str(folder))) == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "chat_template.jinja"])
def test_what_the_model_is_and_how_it_is_asked_count(folder: Path, name: str) -> None:
    before = base_content(ModelSpec(str(folder)))
    with open(folder / name, "ab") as file:
        file.write(b" ")
    assert base_content(ModelSpec(str(folder))) != before
