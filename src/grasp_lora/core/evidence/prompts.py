"""Whether an adapter is asked in the way that it knows: its loss under several prompts."""

from collections.abc import Hashable, Mapping, Sequence
from statistics import fmean

from grasp_lora.base.choice import lowest
from grasp_lora.core.evidence.groups import Gain, mean_gain


def better_prompt(
    losses: Mapping[str, Sequence[float]], used: str, groups: Sequence[Hashable]
) -> tuple[str, Gain] | None:
    """Return the prompt with the lowest mean loss, if it gains more than its standard error.

    Args:
        losses: prompt -> loss of each example's answer, in nats.
        used: the prompt that is in force, a key of `losses`.
        groups: group of each example, such as its context.

    Returns:
        The prompt, and what it gains over the one in force; None if no other is that much better,
        or the groups are fewer than two.
    """
    best = lowest({name: fmean(values) for name, values in losses.items()})
    if best is None or best == used:
        return None
    gains = [old - new for old, new in zip(losses[used], losses[best], strict=True)]
    found = mean_gain(gains, groups)
    return None if found is None or found.gain <= found.error else (best, found)
