"""Counters of energy: read as Linux and NVIDIA's driver show them; told where there are none."""

import sys
import types
from pathlib import Path

import pytest
import torch

from grasp_lora.sharing.energy import counter

CPU = torch.device("cpu")
SPAN = 262_143_328_850


def zone(folder: Path, name: str, microjoules: int) -> Path:
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "max_energy_range_uj").write_text(f"{SPAN}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder


def machine(place: Path) -> list[Path]:
    """Return the zones of a machine with two packages, their parts and a sum of all."""
    return [
        zone(place / "intel-rapl:0", "package-0", 5_000_000),
        zone(place / "intel-rapl:1", "package-1", SPAN - 1_000_000),
        zone(place / "intel-rapl:0:0", "core", 0),
        zone(place / "intel-rapl:2", "psys", 0),
        zone(place / "intel-rapl-mmio:0", "package-0", 0),
    ]


def test_packages_are_summed_up_and_a_counter_that_begins_again_goes_on(tmp_path):
    first, second, core, whole, again = machine(tmp_path)
    joules = counter(CPU, tmp_path)
    assert not isinstance(joules, str)
    assert joules() == 0
    (first / "energy_uj").write_text("7500000\n")
    for other in (core, whole, again):
        (other / "energy_uj").write_text("9000000\n")
    assert joules() == 2.5
    (second / "energy_uj").write_text("500000\n")
    assert joules() == pytest.approx(2.5 + 1.5, abs=1e-5)
    assert joules() == pytest.approx(4.0, abs=1e-5)


@pytest.mark.parametrize("there", [True, False])
def test_a_machine_without_a_counter_is_told(tmp_path, there):
    if there:
        zone(tmp_path / "intel-rapl:0", "psys", 1)
    told = counter(CPU, tmp_path / ("" if there else "none"))
    assert isinstance(told, str)
    assert told.startswith("this machine does not tell its energy (no processor package in ")


def test_a_counter_for_root_alone_is_told(tmp_path, monkeypatch):
    place = machine(tmp_path)[0] / "energy_uj"
    read = Path.read_text

    def refused(self, *given, **named):
        if self == place:
            raise PermissionError(13, "Permission denied", str(self))
        return read(self, *given, **named)

    monkeypatch.setattr(Path, "read_text", refused)
    assert counter(CPU, tmp_path) == f"the energy is told to root alone ({place})"


class NVMLError(Exception):
    pass


def driver(millijoules: list[int | None]) -> types.ModuleType:
    """Return a stand-in for pynvml that shows these values one after the other."""

    def consumed(handle: str) -> int:
        assert handle == "GPU-1234"
        value = millijoules.pop(0)
        if value is None:
            raise NVMLError("Not Supported")
        return value

    module = types.ModuleType("pynvml")
    module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    content = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetTotalEnergyConsumption": consumed,
    }
    module.__dict__.update(content)
    return module


@pytest.fixture
def gpu(monkeypatch):
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
    return torch.device("cuda", 0)


def test_a_gpu_is_found_by_its_own_name(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", driver([4_000, 6_500]))
    joules = counter(gpu)
    assert not isinstance(joules, str)
    assert joules() == 2.5


def test_a_gpu_that_does_not_tell_or_no_package_is_told(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", driver([None]))
    assert counter(gpu) == "this GPU does not tell its energy (Not Supported)"
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "pip install nvidia-ml-py" in str(counter(gpu))
