"""A recipe as frozen data: a way from two adapters and labelled examples to one adapter.

The rows of a comparison and the candidates of a choice are the same recipes. This is our departure
from arXiv 2601.06702, which has one recipe: merge, prune at a learned ratio, fine-tune.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal


@dataclass(frozen=True)
class Start:
    """What a recipe starts from.

    Attributes:
        says: it in words.
        merge: settings of `merge` that make it of the two adapters, or the options of another rule
            to merge by; None where nothing is merged, or as the run's settings say.
    """

    says: str
    merge: Mapping[str, Any] | None = None


def _weighted(source: float, target: float, says: str) -> Start:
    return Start(says, MappingProxyType({"kind": "cat", "weights": (source, target)}))


def _merged(says: str, **merge: Any) -> Start:
    return Start(says, MappingProxyType(merge))


_LINEAR = "linear merge with weights 1 + 1 and the scaling alpha/r"
_UNSCALED = "linear merge as the published code computes it, without alpha/r (weights 1/scaling)"
_PEFT_DENSITY = 0.5

STARTS: Mapping[str, Start] = MappingProxyType(
    {
        "backbone": Start("backbone alone"),
        "source": Start("source adapter"),
        "target": Start("target adapter"),
        "fresh": Start("a new adapter"),
        "merged": Start("merge as configured"),
        "average": _merged("average of the deltas", kind="cat", weights=None),
        "sum": _weighted(1.0, 1.0, "sum of the deltas"),
        "shrunk-0.75": _weighted(0.375, 0.375, "the average shrunk by 0.75"),
        "shrunk-0.5": _weighted(0.25, 0.25, "the average shrunk by 0.5"),
        "weights-75-25": _weighted(0.75, 0.25, "weights 0.75 + 0.25"),
        "weights-25-75": _weighted(0.25, 0.75, "weights 0.25 + 0.75"),
        "linear": _merged(_LINEAR, kind="linear", weights=(1.0, 1.0)),
        # The merge that the published code computes: it drops the scaling of the adapters.
        "linear-unscaled": _merged(_UNSCALED, kind="linear", weights="unscaled"),
        "learned-weights": _merged("merge weights learned by probes", kind="cat", weights="auto"),
        "svd": _merged("low-rank average of the deltas", kind="svd", weights=None),
        "layer-swap": _merged(
            "target adapter in the outer layers, source adapter in the middle",
            kind="layer-swap",
            weights=None,
        ),
        "ties-delta": _merged("TIES on the deltas, as published", kind="ties-delta", weights=None),
        "lorahub": _merged("LoRAHub: weights by nevergrad", rule="lorahub"),
        **{
            kind.replace("_", "-"): _merged(
                f"PEFT's {kind} on the {'deltas' if kind.endswith('svd') else 'factors'}",
                rule="peft",
                kind=kind,
                density=_PEFT_DENSITY,
            )
            for kind in ("ties", "ties_svd", "dare_linear", "dare_linear_svd")
        },
    }
)
"""Name -> start."""
SHOTS = (4, 8)
"""Numbers of solved examples in the prompt that are tried."""


@dataclass(frozen=True)
class Recipe:
    """A way to one adapter.

    Attributes:
        start: a key of `STARTS`, or recipes: then the start is the mean of the deltas that they
            give.
        step: step size of the fine-tuning, as a multiple of the configured one; None trains
            nothing.
        ratio: fraction of the start that is pruned before the fine-tuning, in [0, 1), or
            "learned" by the controller.
        merge: "before" merges the adapters, if the start is a merge, and fine-tunes the merge;
            "after" fine-tunes the source adapter and merges it with the target adapter then.
        rows: "train" trains on the train examples; "labelled" then trains anew on all labelled
            examples, for the epochs that the dev examples chose.
        joint: source examples stand beside the target examples in training, as many.
        shots: solved examples in the prompt.

    Raises:
        ValueError: two of the values exclude each other.
    """

    start: "str | tuple[Recipe, ...]"
    step: float | None = 1.0
    ratio: float | Literal["learned"] = 0.0
    merge: Literal["before", "after"] = "before"
    rows: Literal["train", "labelled"] = "train"
    joint: bool = False
    shots: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.start, str) and self.start not in STARTS:
            raise ValueError(f"no start {self.start!r}; choose from {', '.join(STARTS)}")
        if self.start == "backbone" and self.trained:
            raise ValueError("the bare backbone has no adapter to train; set step to None")
        if self.shots and self.start != "backbone":
            raise ValueError(f"{self.shots} solved examples go with the backbone, not an adapter")
        if self.merge == "after" and (self.start != "source" or not self.trained):
            raise ValueError("a merge afterwards needs the source adapter fine-tuned as its start")
        if self.trained and self.step is not None and not self.step > 0:
            raise ValueError(f"step {self.step} is no multiple of a step size; give one above 0")

    @property
    def trained(self) -> bool:
        """Whether anything is trained after the start is made."""
        return self.step is not None
