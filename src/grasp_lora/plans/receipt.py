"""The receipt of a finished result: a hash of all that it was made from.

Finding that nothing is to be done takes seconds where the libraries are loaded and all rows are
read for it. The receipt tells it from settings and files alone. It only ever says "done": in any
other case the stages compare their keys.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grasp_lora.base.files import (
    DONE_FILE,
    FOLDER_LOCK,
    RECEIPT_FILE,
    STAGE_FILE,
    damage,
    files_below,
    jsonable,
    read_json,
    write_json,
)
from grasp_lora.base.seal import FILES, digest_of
from grasp_lora.config.run_config import RunConfig
from grasp_lora.models.sources import local_content

_PACKAGE = Path(__file__).parents[1]
_NO_CONTENT = (RECEIPT_FILE, FOLDER_LOCK)


@dataclass(frozen=True)
class Request:
    """What a command was asked for.

    Attributes:
        place: the folder of the result.
        config: the settings.
        options: what else the command was given; JSON-able.
        read: further files and folders that are read.
        marker: name of the file in the folder that marks the result as complete.
    """

    place: Path
    config: RunConfig
    options: Mapping[str, Any] = field(default_factory=dict)
    read: Sequence[Path] = ()
    marker: str = STAGE_FILE

    def content(self) -> str | None:
        """Return a hash of all that the result depends on, 64 hex digits.

        It holds the settings but for the folder of the result, the content of every file they name,
        and the code of this package.

        Returns:
            None where some of it is no local file, or several processes share the work.
        """
        if os.environ.get("WORLD_SIZE", "1") != "1" or not self._is_local():
            return None
        settings = {n: one for n, one in self.config.to_record().items() if n != "output"}
        named = {name: _content(path) for name, path in self.config.named_paths().items()}
        try:
            base = local_content(self.config.model.name)
        except ValueError:  # the model is not installed; whoever loads it says so
            return None
        whole = {
            "package": _content(_PACKAGE),
            "settings": settings,
            "options": self.options,
            "named": named,
            "read": [_content(path) for path in self.read],
            "base": base,
        }
        return hashlib.sha256(json.dumps(jsonable(whole), sort_keys=True).encode()).hexdigest()

    def _is_local(self) -> bool:
        """Return whether all examples and a GGUF model are local; other models go by their name."""
        data, model = self.config.data, self.config.model.name
        sections = [data.source, data.target, data.extra, *data.tests.values()]
        if any(s is not None and s.files != "builtin" and not s.paths() for s in sections):
            return False
        return not model.endswith(".gguf") or Path(model).expanduser().is_file()

    def is_done(self) -> bool:
        """Return whether the result is there, whole, and made from what is asked for now."""
        try:
            kept = read_json(self.place / RECEIPT_FILE)
        except (FileNotFoundError, ValueError):
            return False
        markers = self._markers()
        return (
            bool(markers)
            and isinstance(kept, dict)
            and kept.get("markers") == markers
            and all(_is_whole(self.place / name) for name in markers)
            and kept.get("made_from") == (self.content() or "")
        )

    def keep(self, before: str | None) -> None:
        """Write the receipt of a finished result.

        Args:
            before: the content before the work; a result is given no receipt if it has changed
                since, because either may have been read.
        """
        markers = self._markers()
        if before is not None and markers and before == self.content():
            write_json(self.place / RECEIPT_FILE, {"made_from": before, "markers": markers})

    def _markers(self) -> dict[str, str]:
        """Return marker, relative to the place -> its hash; none if the result is not there."""
        judged = f"../{self.place.name}-judged/{STAGE_FILE}"  # of a `finetune.rows: labelled`
        names = [self.marker] + ([judged] if (self.place / judged).is_file() else [])
        if not (self.place / self.marker).is_file():
            return {}
        return {name: digest_of(self.place / name) for name in names}


def run_request(config: RunConfig) -> Request:
    """Return the request for a whole run."""
    return Request(config.output, config, marker=DONE_FILE)


def _is_whole(marker: Path) -> bool:
    """Return whether all that a marker seals is as it was, and all that markers among it seal."""
    if damage(marker):
        return False
    below = [name for name in read_json(marker).get(FILES, {}) if name.endswith(f"/{STAGE_FILE}")]
    return all(_is_whole(marker.parent / name) for name in below)


def _content(path: Path) -> Any:
    """Return the hash of a file, or name -> hash of the files of a folder; None if it is absent."""
    if path.is_file():
        return digest_of(path)
    if not path.is_dir():
        return None
    names = sorted(name for name in files_below(path) if not name.endswith((*_NO_CONTENT, ".pyc")))
    return {name: digest_of(path / name) for name in names}
