"""What a shipped adapter will save on new examples, with its uncertainty.

The held examples judge an adapter that was trained on the train examples alone. The one that is
shipped is trained on all labels, and no label is left to judge it. So the interval has three parts:
the error of the gain on the held examples, the luck of as many new examples, and what training on
all labels, and averaging, change. The last is known from recorded pairs alone and differs much from
pair to pair.
"""

# scipy leaves its results untyped.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from dataclasses import dataclass

from scipy import stats

from grasp_lora.core.evidence.groups import Gain

RETRAINED = (-0.019, 0.084, 0.134, 0.078)
"""Nats of test loss that the adapter that is shipped saved against the trial that it was chosen by,
pair by pair (English to Arabic, Spanish, Swahili, Chinese; docs/results/recipes.md): 116 (96)
labels in place of 50 (40), and a mean in place of one adapter."""
RETRAINED_RATIO = 116 / 50
LEVEL = 0.95


@dataclass(frozen=True)
class Expected:
    """A gain that is expected on new examples, as many as were held.

    Attributes:
        gain: the expected gain, in nats.
        low: lower end of the interval of level `LEVEL`.
        high: upper end.
    """

    gain: float
    low: float
    high: float


def expected(measured: Gain, labels: int, trained: int) -> Expected:
    """Return the gain that is expected of the shipped adapter.

    The variances of the parts are added, with the degrees of freedom of Welch and Satterthwaite.

    Args:
        measured: the gain on held examples, of the training on `trained` examples.
        labels: examples that the shipped adapter is trained on.
        trained: examples that the judged adapter was trained on; at most `labels`.
    """
    more = _share(labels, trained)
    pairs = len(RETRAINED)
    mean = math.fsum(RETRAINED) / pairs
    spread = math.fsum((one - mean) ** 2 for one in RETRAINED) / (pairs - 1)
    parts = (
        (2 * measured.error**2, measured.groups - 1),
        (more**2 * spread * (1 + 1 / pairs), pairs - 1),
    )
    whole = math.fsum(variance for variance, _ in parts)
    gain = measured.gain + more * mean
    if whole == 0:
        return Expected(gain, gain, gain)
    freedom = whole**2 / math.fsum(variance**2 / free for variance, free in parts)
    half = float(stats.t.isf((1 - LEVEL) / 2, freedom)) * math.sqrt(whole)
    return Expected(gain, gain - half, gain + half)


def expected_of_labels(labels: int, trained: int) -> float:
    """Return the nats that training on all labels is expected to save, from recorded pairs.

    Args:
        labels: examples that the shipped adapter is trained on.
        trained: examples that the judged adapter was trained on; at most `labels`.
    """
    return _share(labels, trained) * math.fsum(RETRAINED) / len(RETRAINED)


def _share(labels: int, trained: int) -> float:
    """Return how far more labels go, as a part of the step of the recorded pairs, in logs."""
    return math.log(labels / trained) / math.log(RETRAINED_RATIO)
