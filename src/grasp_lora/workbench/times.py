"""The times of a run: measured stage by stage, and kept in its folder across resumed starts."""

from pathlib import Path
from typing import Any

import torch

from grasp_lora.base.clock import PARTS, Clock
from grasp_lora.base.files import (
    TIMES_FILE,
    damage,
    put_aside,
    read_json,
    write_json,
    write_sealed,
    write_text,
)
from grasp_lora.base.words import shown_path
from grasp_lora.config.run_config import RunConfig
from grasp_lora.models.devices import choose_device
from grasp_lora.report.pictures import plot_profile
from grasp_lora.report.time_words import profile_markdown
from grasp_lora.workbench.context import Context
from grasp_lora.workbench.processes import is_main


def open_clock(config: RunConfig, profile: bool) -> Clock:
    """Return the clock of a run. For a profile on a GPU the clock waits for the device.

    Raises:
        ValueError: the device is unknown or not available.
    """
    if profile and choose_device(config.model.device).type != "cpu":
        return Clock(synchronize=torch.accelerator.synchronize)
    return Clock()


def carry_times(context: Context) -> None:
    """Add the times of earlier processes of this run; write them now and at checkpoints.

    Damaged times are put aside and said: they change no result.
    """
    kept = context.config.output / TIMES_FILE
    if is_main() and kept.exists():
        if damage(kept):
            where = shown_path(put_aside(kept).name)
            context.reporter.say(
                f"{shown_path(kept)} is damaged, so earlier times are not counted; it is kept as "
                f"{where}"
            )
        else:
            context.clock.add(read_json(kept))
    keep_times(context)
    context.on_saved = lambda: keep_times(context)


def keep_times(context: Context) -> dict[str, Any]:
    """Write the times so far into the run folder, and return them (see `Clock.to_json`)."""
    times = context.clock.to_json()
    if is_main():
        write_sealed(context.config.output / TIMES_FILE, times, ())
    return times


def write_profile(out: Path, times: dict[str, Any]) -> None:
    """Write `profile.json`, `profile.md` and `profile.png` into a run folder.

    Args:
        out: the run folder.
        times: the result of `Clock.to_json()` for the run's clock.
    """
    profile = times | {"parts": dict(PARTS)}
    write_json(out / "profile.json", profile)
    plot_profile(profile, out / "profile.png")
    write_text(out / "profile.md", profile_markdown(profile))
