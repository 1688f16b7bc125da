"""Settings of the ratio controller: one frozen dataclass, and the values each preset gives it."""

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, Literal, TypeAlias

from grasp_lora.base.words import shown

Preset: TypeAlias = Literal["standard", "paper"]
ProbeRows: TypeAlias = Literal["micro-dev", "micro-dev+dev"]
WhenFlat: TypeAlias = Literal["minimum", "largest"]

CONTROLLER_PRESETS: Final[Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "standard": {
            "low": 0.0,
            "high": 0.8,
            "rounds": 8,
            "interval": None,
            "rows": 12,
            "baseline": False,
            "probe_rows": "micro-dev+dev",
            "lr": 1.0,
            "anchor": 0.0,
            "entropy": 0.0,
        },
        "paper": {
            "low": 0.10,
            "high": 0.80,
            "rounds": None,
            "interval": 10,
            "rows": 16,
            "baseline": True,
            "probe_rows": "micro-dev",
            "lr": 0.05,
            "anchor": 0.05,
            "entropy": 0.01,
        },
    }
)
"""Preset -> the settings that differ by preset; `paper` holds those of arXiv 2601.06702."""

LEAST_CANDIDATES = 3
"""Candidates of a round that compares the lowest ratio, one ratio for all groups, and a profile."""
_PAPER_START = 0.40
_STANDARD_SIGMA = 0.1

_BY_PRESET: Final[Any] = None  # typed Any so that readers of the settings never meet an Optional


@dataclass(frozen=True)
class ControllerConfig:
    """What the controller may do and how often; a field left out takes its preset's value.

    The values are filled in once, at construction. `dataclasses.replace` changes any of them but
    the preset, whose values the other fields hold by then: for another preset build a new config.

    Raises:
        ValueError: If a setting breaks its rule, all faults named in one message; or if
            `dataclasses.replace` would change the preset.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    preset: Preset = "standard"
    """Rule that moves the policy, and the source of the values left out."""
    low: float = _BY_PRESET
    """Smallest ratio that may be tried, in [0, 1)."""
    high: float = _BY_PRESET
    """Largest ratio that may be tried, above `low` and below 1."""
    rounds: int | None = _BY_PRESET
    """Rounds spread evenly over the run; larger costs more probes. None when `interval` is used."""
    interval: int | None = _BY_PRESET
    """Optimizer steps from round to round. None when `rounds` is used."""
    candidates: int = 3
    """Ratios tried per round; each costs one evaluation of the probing rows."""
    rows: int = _BY_PRESET
    """Probing rows per round; the same rows for all candidates of a round."""
    baseline: bool = _BY_PRESET
    """Whether a round also measures the model as it is, the published reference of the rewards;
    costs one more evaluation. Without it the reference is the lowest ratio tried."""
    probe_rows: ProbeRows = _BY_PRESET
    """Source of the probing rows: a fixed micro-dev set, or a new draw from micro-dev and dev."""
    reward: str = "loss"
    """Measure of a trial: `loss`, a metric of generated answers (chrf, token_f1, exact_match,
    rougeL, ...), or your own `module:function`, which runs its Python code (danger). Metrics of few
    rows are coarse."""
    lr: float = _BY_PRESET
    """Step size of the policy update; for `standard` 1 is the full natural step."""
    anchor: float = _BY_PRESET
    """Pull of the policy's centre towards the current ratio; 0 is none."""
    entropy: float = _BY_PRESET
    """Widening per round: added to sigma (`paper`) or to log sigma (`standard`)."""
    max_step: float = 0.10
    """Largest change of the current ratio in one commit, in (0, 1]."""
    when_flat: WhenFlat = "minimum"
    """Ratio to take if no gain was shown (`standard`): the minimum of the curve, or the largest
    ratio that is worse by at most one standard error, for the smallest adapter."""
    clear_moments: bool = True
    """Whether new masks, in search and final run, clear the optimizer's first moment (momentum) of
    the entries they prune."""
    filled_for: InitVar[None] = None
    """Not a setting: how `dataclasses.replace` hands on the preset that the values are from."""

    @property
    def label(self) -> str:
        """Name of the preset, with "changed" if a setting is not the preset's."""
        plain = self == ControllerConfig(preset=self.preset)
        return self.preset if plain else f"{self.preset}, changed"

    @property
    def start(self) -> float:
        """Current ratio before the first commit, in [low, high]. No mask is applied before it.

        `paper` starts at the published 0.4, `standard` at `low`.
        """
        if self.preset == "paper":
            return min(max(_PAPER_START, self.low), self.high)
        return self.low

    @property
    def sigma(self) -> float:
        """Standard deviation of the first candidates around the centre, in units of ratio."""
        return (self.high - self.low) / 6 if self.preset == "paper" else _STANDARD_SIGMA

    def __post_init__(self, filled_for: str | None) -> None:
        if self.preset not in CONTROLLER_PRESETS:
            raise ValueError(
                f"unknown controller preset {shown(self.preset)}; "
                f"choose one of {sorted(CONTROLLER_PRESETS)}"
            )
        if filled_for not in (None, self.preset):
            raise ValueError(
                f"dataclasses.replace cannot change the controller preset from {filled_for!r} to "
                f"{self.preset!r}, as the other values would stay those of {filled_for!r}; build "
                f"ControllerConfig(preset={self.preset!r}) with the settings that differ from it"
            )
        object.__setattr__(self, "filled_for", self.preset)
        self._fill_from_preset()
        faults = [message for broken, message in self._rules() if broken]
        if faults:
            raise ValueError("controller settings: " + "; ".join(faults))

    def _fill_from_preset(self) -> None:
        values = dict(CONTROLLER_PRESETS[self.preset])
        if self.rounds is not None or self.interval is not None:
            # A schedule of the user's own replaces the preset's, whichever of the two it is.
            values["rounds"] = values["interval"] = None
        # The setter goes past the freeze: nobody sees the object before construction ends.
        for name, value in values.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def _rules(self) -> tuple[tuple[bool, str], ...]:
        """Return (is it broken, what to say) for every rule."""
        return (
            (
                not 0.0 <= self.low < self.high < 1.0,
                f"the range must satisfy 0 <= low < high < 1, got low={self.low}, "
                f"high={self.high}: give ratios as fractions, {_percent_as_fraction(self.high)}",
            ),
            (
                (self.rounds is None) == (self.interval is None),
                f"exactly one of rounds and interval is used, got rounds={self.rounds}, "
                f"interval={self.interval}: leave one out",
            ),
            *(_at_least_one(self, name) for name in ("rounds", "interval", "candidates", "rows")),
            _positive(self, "lr"),
            *(_not_negative(self, name) for name in ("anchor", "entropy")),
            (
                not 0.0 < self.max_step <= 1.0,
                f"max_step must lie in (0, 1], got {self.max_step}: give a fraction, "
                f"{_percent_as_fraction(self.max_step)}",
            ),
            _one_of(self, "probe_rows", ("micro-dev", "micro-dev+dev")),
            _one_of(self, "when_flat", ("minimum", "largest")),
        )


def _percent_as_fraction(value: float) -> str:
    percent = value if 1 < value <= 100 else 40
    return f"{percent:g} % as {percent / 100:g}"


def _at_least_one(config: ControllerConfig, name: str) -> tuple[bool, str]:
    value: int | None = getattr(config, name)
    return value is not None and value < 1, f"{name} must be at least 1, got {value}: raise it"


def _positive(config: ControllerConfig, name: str) -> tuple[bool, str]:
    value: float = getattr(config, name)
    broken = not (math.isfinite(value) and value > 0)
    return broken, f"{name} must be a finite number above 0, got {value}: raise it"


def _not_negative(config: ControllerConfig, name: str) -> tuple[bool, str]:
    value: float = getattr(config, name)
    broken = not (math.isfinite(value) and value >= 0)
    return broken, f"{name} must be a finite number of at least 0, got {value}: 0 turns it off"


def _one_of(config: ControllerConfig, name: str, allowed: tuple[str, ...]) -> tuple[bool, str]:
    value: str = getattr(config, name)
    return (
        value not in allowed,
        f"{name} must be one of {list(allowed)}, got {shown(value)}: choose one",
    )
