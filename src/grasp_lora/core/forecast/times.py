"""Time and memory of training, reading and answering on a machine, from a model of kernels.

A kernel takes the longer of its FLOPs over the machine's rate and its bytes over its bandwidth. A
decoder layer is five of them: products with the frozen weights, attention, passes over
activations, the adapter's products, and, for frozen weights in 4 bits, unpacking them. A host that
waits for its kernels adds the time it takes to start them; one that runs ahead hides the shorter of
the two.

A backward pass multiplies as often as the forward one, since frozen weights have no gradient;
attention and passes over memory take twice as long as forward.

Several ranks share the rows of a step, so that a step is the same step on any number of them, and
no more ranks work than a step has rows. Where the weights do not fit one GPU they are divided over
all ranks, and every layer's are gathered before it is used (FSDP, ZeRO-3).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grasp_lora.core.forecast.machines import Machine, Shape

FLOAT32, BFLOAT16, FOUR_BITS = 4.0, 2.0, 0.5 + 4 / 64
"""Bytes of an entry; 4 bits have a float32 scale for each 64 entries."""

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_LAYER_PASSES = 12
"""Reads and writes of a hidden state in a layer: two norms, two sums, rotation, copies."""
_INNER_PASSES = 4
"""Reads and writes of the feed-forward activations outside products."""
_OPTIMIZER_PASSES = 12
"""Reads and writes of an adapter's entries in one optimizer step, clipping included."""
_KEPT_ENTRY = 5 * FLOAT32
"""Bytes an adapter entry takes: value, gradient, two moments, stashed value."""
_MEETING = 30e-6
"""Seconds until ranks have met, for each doubling of their number."""
_IMPORTS, _READING = 10.0, 2e9
"""Seconds of imports, and bytes/s from disk to GPU. Assumed, not measured."""
_USABLE = 0.92
"""Part of a GPU's memory that a run may fill."""


@dataclass(frozen=True)
class Setting:
    """How a backbone is used.

    Attributes:
        shape: its size.
        machine: where it runs.
        rank: of LoRA.
        targets: the matrices of a layer that have LoRA, keys of `Shape.matrices`.
        entry: bytes of an entry of the frozen weights.
        activation: bytes of an entry of the activations.
        checkpointing: activations are computed again in the backward pass.
        together: most examples of a step in one forward pass; the others are accumulated.
    """

    shape: Shape
    machine: Machine
    rank: int = 16
    targets: tuple[str, ...] = ALL
    entry: float = BFLOAT16
    activation: float = BFLOAT16
    checkpointing: bool = False
    together: int | None = None

    @property
    def adapter(self) -> int:
        """Entries of the adapter."""
        return self.shape.layers * self.rank * self.shape.sides(self.targets)

    def in_a_forward(self, rows: int, ranks: int) -> int:
        """Return the examples of a step that one GPU reads at once."""
        own = math.ceil(rows / ranks)
        return own if self.together is None else min(own, self.together)


def kernel(machine: Machine, flops: float, moved: float, rate: float | None = None) -> float:
    """Return the seconds of a kernel.

    Args:
        machine: where it runs.
        flops: what it computes.
        moved: bytes that it reads and writes.
        rate: FLOP/s; None takes that of products of matrices.
    """
    return max(flops / (rate or machine.matrix_rate), moved / machine.bandwidth)


def layer_seconds(setting: Setting, rows: int, length: float, held: float = 0.0) -> float:
    """Return the seconds of the kernels of one decoder layer, forward.

    Args:
        setting: backbone and machine.
        rows: examples.
        length: new tokens of each.
        held: tokens of each that are in the cache already.
    """
    products, attention, passes = _parts(setting, rows, length, held)
    return products + attention + passes


def _parts(
    setting: Setting, rows: int, length: float, held: float = 0.0
) -> tuple[float, float, float]:
    """Return the seconds of products, of attention, and of passes over memory of a layer."""
    shape, machine, size = setting.shape, setting.machine, setting.activation
    tokens, weights = rows * length, shape.layer_weights
    moved = tokens * size * shape.sides(ALL)
    products = kernel(machine, 2 * weights * tokens, weights * setting.entry + moved)
    if setting.entry < 1:  # unpacked to activations' format, written and read again
        products += weights * (setting.entry + size) / machine.bandwidth
    adapter = setting.adapter / shape.layers
    moved = tokens * size * shape.sides(setting.targets)
    products += kernel(machine, 2 * adapter * tokens, adapter * FLOAT32 + moved)
    pairs = rows * length * (held + length / 2)
    kept = rows * (held + length) * 2 * shape.key_width * size
    attention = kernel(machine, 4 * pairs * shape.attention_width, kept, machine.attention_rate)
    passed = _LAYER_PASSES * shape.hidden + _INNER_PASSES * shape.inner
    return products, attention, tokens * size * passed / machine.bandwidth


def output_seconds(setting: Setting, answers: float) -> float:
    """Return the seconds of the output layer on so many tokens, forward."""
    shape, size = setting.shape, setting.activation
    entries = shape.vocabulary * shape.hidden
    logits = answers * shape.vocabulary
    return kernel(setting.machine, 2 * entries * answers, entries * size + logits * 3 * FLOAT32)


def _together(setting: Setting, device: float, passes: float) -> float:
    """Return the seconds of work of which the host starts `passes` passes over all layers."""
    machine = setting.machine
    host = passes * setting.shape.layers * machine.layer_seconds
    return device + host if machine.waits else max(device, host)


def read_seconds(setting: Setting, rows: int, length: float, answers: float = 8.0) -> float:
    """Return the seconds of one forward pass without a gradient.

    Args:
        setting: backbone and machine.
        rows: examples.
        length: tokens of each.
        answers: tokens of each whose logits are computed.
    """
    device = setting.shape.layers * layer_seconds(setting, rows, length)
    return _together(setting, device + output_seconds(setting, rows * answers), 1)


def step_seconds(
    setting: Setting, rows: int, length: float, answers: float = 8.0, ranks: int = 1
) -> float:
    """Return the seconds of one optimizer step.

    Args:
        setting: backbone and machine.
        rows: examples of the step, on all ranks together.
        length: tokens of each.
        answers: tokens of each that have a loss.
        ranks: GPUs that share them.
    """
    shape, machine = setting.shape, setting.machine
    own = math.ceil(rows / ranks)
    at_once = setting.in_a_forward(rows, ranks)
    forwards = own / at_once
    products, attention, passes = (forwards * s for s in _parts(setting, at_once, length))
    again = 1 if setting.checkpointing else 0
    layers = shape.layers * ((2 + again) * products + (3 + again) * (attention + passes))
    entries = setting.adapter
    optimizer = _OPTIMIZER_PASSES * FLOAT32 * entries / machine.bandwidth
    device = layers + 2 * output_seconds(setting, own * answers)
    moved = 0.0
    if sharded(setting, rows, length, ranks):
        weights = gather_seconds(machine, shape.weights * setting.entry, ranks)
        moved = forwards * (2 + again) * weights
    seconds = _together(setting, max(device, moved), math.ceil(forwards) * (2 + again))
    return seconds + optimizer + 2 * gather_seconds(machine, entries * FLOAT32, ranks)


def gather_seconds(machine: Machine, size: float, ranks: int) -> float:
    """Return the seconds until every rank has all `size` bytes, of which each had its part."""
    if ranks == 1:
        return 0.0
    speed = machine.link if ranks <= machine.node else min(machine.link, machine.network)
    return size * (ranks - 1) / ranks / speed + _MEETING * math.log2(ranks)


def answer_seconds(setting: Setting, rows: int, length: float, new_tokens: int) -> float:
    """Return the seconds of answering one batch with the cache.

    Args:
        setting: backbone and machine.
        rows: prompts of the batch.
        length: tokens of each.
        new_tokens: tokens written after each.
    """
    written = layer_seconds(setting, rows, 1, length + new_tokens / 2)
    device = setting.shape.layers * written + output_seconds(setting, rows)
    return read_seconds(setting, rows, length, 1) + new_tokens * _together(setting, device, 1)


def memory_bytes(setting: Setting, rows: int, length: float, ranks: int = 1) -> float:
    """Return the bytes that a step takes on each GPU, weights whole on each.

    Activations are the inputs and outputs of every product; with checkpointing, those of one layer
    and a hidden state for each. Logits are counted for 8 answer tokens a row.
    """
    shape, size = setting.shape, setting.activation
    own = setting.in_a_forward(rows, ranks)
    kept = shape.layers * shape.sides(ALL)
    if setting.checkpointing:
        kept = shape.sides(ALL) + shape.layers * shape.hidden
    logits = own * 8 * shape.vocabulary * 3 * FLOAT32
    adapter = setting.adapter * _KEPT_ENTRY
    return weight_bytes(setting) + adapter + own * length * kept * size + logits


def weight_bytes(setting: Setting) -> float:
    """Return the bytes of the frozen weights; embeddings are never in 4 bits."""
    shape = setting.shape
    ends = shape.parameters - shape.weights
    return shape.weights * setting.entry + ends * max(setting.entry, setting.activation)


def load_seconds(setting: Setting) -> float:
    """Return the seconds in which a process imports its packages and loads the backbone."""
    return _IMPORTS + weight_bytes(setting) / _READING


def sharded(setting: Setting, rows: int, length: float, ranks: int) -> bool:
    """Return whether the weights have to be divided over the ranks."""
    whole = memory_bytes(setting, rows, length, ranks)
    return ranks > 1 and whole > _USABLE * setting.machine.memory


def held_bytes(setting: Setting, rows: int, length: float, ranks: int) -> float:
    """Return the bytes that a step takes on each GPU, weights divided if they have to be."""
    whole = memory_bytes(setting, rows, length, ranks)
    if not sharded(setting, rows, length, ranks):
        return whole
    weights, one = weight_bytes(setting), setting.shape.layer_weights * setting.entry
    return whole - weights + weights / ranks + 2 * one


def fits(setting: Setting, rows: int, length: float, ranks: int) -> bool:
    """Return whether a step fits the memory of so many GPUs."""
    return held_bytes(setting, rows, length, ranks) <= _USABLE * setting.machine.memory


@dataclass(frozen=True)
class Search:
    """A search of the ratio: a training, and probes between its steps.

    Attributes:
        steps: optimizer steps.
        rows: examples of a step.
        length: tokens of an example.
        rounds: rounds of probes.
        probes: examples read in a round, over all candidates.
    """

    steps: int = 130
    rows: int = 4
    length: float = 256.0
    rounds: int = 8
    probes: int = 36


@dataclass(frozen=True)
class SearchTimes:
    """Seconds of a search.

    Attributes:
        training: of the steps.
        riding: of the probes, if all ranks stop training for them.
        beside: of the whole, if one more GPU holds a backbone and probes while the others train. A
            round's verdict then comes late by the time of its probes.
    """

    training: float
    riding: float
    beside: float

    @property
    def whole(self) -> float:
        """Seconds of the search as it is built: probes ride along."""
        return self.training + self.riding


def search_times(setting: Setting, search: Search, ranks: int) -> SearchTimes:
    """Return the seconds of a search on so many ranks.

    Each rank reads its part of a round's rows in one forward for each candidate that it has a part
    of; a weight that is divided over the ranks is gathered for every forward.
    """
    training = search.steps * step_seconds(setting, search.rows, search.length, ranks=ranks)
    own = math.ceil(search.probes / ranks)
    forward = read_seconds(setting, own, search.length)
    if sharded(setting, search.rows, search.length, ranks):
        weights = setting.shape.weights * setting.entry
        forward = max(forward, gather_seconds(setting.machine, weights, ranks))
    alone = search.rounds * read_seconds(setting, search.probes, search.length)
    return SearchTimes(training, search.rounds * forward, max(training, alone))


def last_rank_that_pays(setting: Setting, search: Search, most: int, least: float = 0.5) -> int:
    """Return the largest number of ranks, by doubling, at which each doubling still pays.

    Args:
        setting: backbone and machine.
        search: the work.
        most: GPUs there are.
        least: efficiency that is asked for: the time of the fewest ranks that hold the model, over
            the time of this many and over the factor between them.

    Returns:
        0 if the work does not fit even `most` of them.
    """
    numbers = [2**power for power in range(int(math.log2(most)) + 1)]
    able = [n for n in numbers if fits(setting, search.rows, search.length, n)]
    if not able:
        return 0
    first = search_times(setting, search, able[0]).whole * able[0]
    paying = [n for n in able if first / (search_times(setting, search, n).whole * n) >= least]
    return max(paying)


def makespan(stages: Mapping[str, tuple[float, Sequence[str]]], workers: int) -> float:
    """Return the seconds until all stages are done, each by one worker as soon as one is free.

    Args:
        stages: name -> (seconds, names of stages that must be done before), in an order in which
            they can be done. Names that are no stages are there already.
        workers: how many stages are done at once.
    """
    free, done = [0.0] * workers, dict[str, float]()
    for name, (seconds, needs) in stages.items():
        ready = max((done[need] for need in needs if need in done), default=0.0)
        first = min(range(workers), key=lambda worker: max(free[worker], ready))
        done[name] = free[first] = max(free[first], ready) + seconds
    return max(done.values(), default=0.0)
