"""What there is on this machine for grasp-lora, and what is missing: versions, devices, the hub."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from grasp_lora.base.words import without_home
from grasp_lora.data.fetch import hub_access
from grasp_lora.models.cache import cache_folder
from grasp_lora.models.devices import choose_device, choose_dtype
from grasp_lora.report.document import Document, Lines, Section, Table, cells
from grasp_lora.workbench.processes import machine

_PACKAGE = "grasp-lora"
_DEVELOPERS = "dev"
_GIB = 2**30


@dataclass(frozen=True)
class Need:
    """A package that grasp-lora needs.

    Attributes:
        name: its name.
        wanted: the versions that work, such as ">=2.6".
        installed: the version there is; None if there is none.
        extra: the extra of grasp-lora that it belongs to; "" where everything needs it.
    """

    name: str
    wanted: str
    installed: str | None
    extra: str

    @property
    def met(self) -> bool:
        """Whether a version that works is installed."""
        if self.installed is None:
            return False
        return Requirement(f"{self.name}{self.wanted}").specifier.contains(self.installed, True)


def needs() -> list[Need]:
    """Return the packages that the installed grasp-lora names, those of developers left out.

    Raises:
        ValueError: grasp-lora is not installed as a package, so nothing says what it needs.
    """
    try:
        named = [Requirement(one) for one in metadata.requires(_PACKAGE) or []]
        extras = metadata.metadata(_PACKAGE).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            "grasp-lora is not installed as a package, so its needs are not known; install it with "
            "pip install, from its wheel or its folder"
        ) from None
    found: list[Need] = []
    for one in named:
        belongs = [e for e in extras if one.marker and one.marker.evaluate({"extra": e})]
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            belongs = [""]
        found += [
            Need(one.name, str(one.specifier), _installed(one.name), extra)
            for extra in belongs
            if extra != _DEVELOPERS
        ]
    return found


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def advice(found: list[Need]) -> list[str]:
    """Return what to install, a line for what is needed and one for each extra."""
    lines: list[str] = []
    for extra in dict.fromkeys(one.extra for one in found):
        lost = [f"{one.name}{one.wanted}" for one in found if one.extra == extra and not one.met]
        if not lost:
            continue
        listed = " ".join(f"'{one}'" for one in lost)
        command = f"'{_PACKAGE}[{extra}]'" if extra else listed
        why = f"optional, for {extra}" if extra else "needed"
        lines.append(f"{why}: pip install {command} (now missing: {', '.join(lost)})")
    return lines


def examination(timeout: float = 5.0) -> tuple[Document, bool]:
    """Return what was found, and whether all that is needed is there.

    Args:
        timeout: seconds that the hub has to answer.
    """
    found = needs()
    ready = all(one.met for one in found if not one.extra)
    told = "everything needed is installed" if ready else "a needed package is missing or too old"
    packages = tuple(
        cells((one.name, one.installed or "none", one.wanted or "any", one.extra or "needed"))
        for one in found
    )
    titles = ("package", "installed", "works", "for")
    sections = (
        Section("Machine", (Table(("what", "found"), tuple(map(cells, _machine())), texts=True),)),
        Section("Packages", (Table(titles, packages, texts=True),)),
        Section("Hub", (Lines((hub_access(timeout),)),)),
        Section("To install", (Lines(tuple(advice(found))),)),
    )
    return Document("What there is on this machine", (told,), sections), ready


def _machine() -> Iterator[tuple[str, str]]:
    about, device = machine(), choose_device("auto")
    yield "device", f"{device}, {str(choose_dtype('auto', device)).removeprefix('torch.')}"
    yield "processor", f"{about['cpu']}, {about['cores']} cores"
    yield "GPU", about["gpu"] or "none"
    memory = psutil.virtual_memory()
    yield "memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB free"
    for name, place in (("here", Path.cwd()), ("cache", cache_folder())):
        there = next(one for one in (place, *place.parents) if one.exists())
        free = shutil.disk_usage(there).free / _GIB
        yield f"disk, {name}", f"{free:.1f} GiB free in {without_home(place)}"
