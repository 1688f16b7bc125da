"""How much energy the device uses, where the machine tells it.

Linux has a counter of each processor package (RAPL), which is often readable for root alone;
NVIDIA's driver has one of each GPU (NVML). Both count all that runs there, not one program.
"""

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

POWERCAP = Path("/sys/class/powercap")
_ZONES = "intel-rapl:*"
"""Folders of the counters; AMD's have this name too. Those of parts of a package match as well."""
Joules = Callable[[], float]
"""Joules since the counter was made."""


def counter(device: torch.device, powercap: Path = POWERCAP) -> Joules | str:
    """Return a counter of the energy of a device, or why there is none.

    Args:
        device: a GPU, or the processor, of which all packages are summed up.
        powercap: the folder in which Linux shows the counters of the processor.
    """
    return _of_gpu(device) if device.type == "cuda" else _of_processor(powercap)


def _of_processor(powercap: Path) -> Joules | str:
    zones = [zone for zone in sorted(powercap.glob(_ZONES)) if _is_package(zone)]
    if not zones:
        return f"this machine does not tell its energy (no processor package in {powercap})"
    try:
        counters = [_package(zone) for zone in zones]
    except PermissionError as error:
        return f"the energy is told to root alone ({error.filename})"
    return lambda: sum(one() for one in counters)


def _is_package(zone: Path) -> bool:
    """Return whether a zone is a whole package; the whole machine would count them twice."""
    name = zone / "name"
    return name.is_file() and name.read_text().startswith("package")


def _package(zone: Path) -> Joules:
    """Return the counter of one package. The system's number begins again at 0 after its range."""
    span = int((zone / "max_energy_range_uj").read_text()) + 1
    last, total = int((zone / "energy_uj").read_text()), 0

    def joules() -> float:
        nonlocal last, total
        now = int((zone / "energy_uj").read_text())
        total += (now - last) % span
        last = now
        return total / 1e6

    return joules


def _of_gpu(device: torch.device) -> Joules | str:
    if importlib.util.find_spec("pynvml") is None:
        return "the energy of a GPU needs the package nvidia-ml-py; run: pip install nvidia-ml-py"
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        # Numbers differ between NVML and a process that sees some of the GPUs alone.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        start = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        return f"this GPU does not tell its energy ({error})"
    return lambda: (nvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start) / 1e3
