"""The export that Python is offered: the same as the command's, and it prints nothing."""

import json

import pytest

import grasp_lora.sharing.export
from grasp_lora import export
from grasp_lora.adapters.folder import read_adapter
from helpers import tiny_adapter_folder, tiny_model


def test_an_export_returns_its_folder_and_what_there_is_to_say(tmp_path, capsys):
    adapter = tiny_adapter_folder(tmp_path / "adapter", tiny_model(), r=4)
    result = export(str(adapter), "peft", tmp_path / "out", rank=2, public_name="owner/name")
    assert result.folder == tmp_path / "out"
    assert result.told[0].startswith("trimmed to rank 2")
    assert result.told[-1].startswith("read back: the deltas differ from the adapter's by ")
    assert {one.rank for one in read_adapter(result.folder).adapter.values()} == {2}
    about = json.loads((result.folder / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == "owner/name"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("to", "public_name", "message"),
    [
        ("onnx", None, "'onnx' is unknown"),
        ("peft", "a/b/c", "'a/b/c' is no hub id; write owner/name"),
    ],
)
def test_wrong_arguments_are_one_error_and_leave_nothing(tmp_path, to, public_name, message):
    with pytest.raises(ValueError, match=message):
        export(tmp_path / "adapter", to, tmp_path / "out", public_name=public_name)
    assert list(tmp_path.iterdir()) == []


def test_the_name_stays_a_function_once_its_module_is_loaded():
    from grasp_lora import export as again

    assert again is export
    assert grasp_lora.sharing.export is not export
