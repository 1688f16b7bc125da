"""GPUs and sizes of backbones, as their makers publish them.

Rates are those of dense bfloat16 products with float32 sums; some data sheets print twice as much,
for matrices that are half zeros. Links are those of one direction. Prices are an hour's of one GPU
on demand, as read from the pages of Hugging Face (l4, a10g, l40s, h200), Lambda (a100, h100, b200)
and RunPod (rtx4090) in late 2026; they change, so whoever plans gives their own.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True)
class Machine:
    """One GPU, or the CPU of one process.

    Attributes:
        matrix_rate: FLOP/s that products of matrices reach.
        attention_rate: FLOP/s that attention reaches.
        bandwidth: bytes/s between memory and compute units that passes over memory reach.
        memory: bytes.
        link: bytes/s to the other GPUs of the same node.
        layer_seconds: time that the host takes to start the kernels of one decoder layer, forward
            alone; as much again for its backward pass.
        waits: whether the host waits for every kernel (a CPU) or runs ahead of the device (a GPU).
        price: dollars an hour.
        network: bytes/s between nodes, of a whole node.
        node: GPUs of a node.
    """

    matrix_rate: float
    attention_rate: float
    bandwidth: float
    memory: float
    link: float
    layer_seconds: float
    waits: bool = False
    price: float = 0.0
    network: float = 10 * _GIGA
    node: int = 8


MATRIX_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.6, 0.3, 0.8
"""Parts of the published peaks that kernels are taken to reach. Assumed, not measured."""

LAYER_SECONDS = 0.5e-3
"""What Python, transformers and PEFT take to start a layer's kernels. Assumed, not measured."""


def _gpu(peak: float, bandwidth: float, memory: float, link: float, price: float) -> Machine:
    """Return a GPU from TFLOP/s, GB/s, GB, GB/s and dollars.

    GPUs with NVLink are taken to stand in nodes with a network of 400 Gbit/s for each of eight,
    the others in nodes with 100 Gbit/s in all.
    """
    return Machine(
        matrix_rate=MATRIX_SHARE * peak * _TERA,
        attention_rate=ATTENTION_SHARE * peak * _TERA,
        bandwidth=BANDWIDTH_SHARE * bandwidth * _GIGA,
        memory=memory * _GIGA,
        link=BANDWIDTH_SHARE * link * _GIGA,
        layer_seconds=LAYER_SECONDS,
        price=price,
        network=BANDWIDTH_SHARE * (400 if link > 100 else 12.5) * _GIGA,
    )


GPUS: Mapping[str, Machine] = {
    "l4": _gpu(121, 300, 24, 32, 0.80),
    "a10g": _gpu(70, 600, 24, 32, 1.00),
    "rtx4090": _gpu(165, 1008, 24, 32, 0.69),
    "l40s": _gpu(362, 864, 48, 32, 1.80),
    "a100-40gb": _gpu(312, 1555, 40, 300, 1.99),
    "a100": _gpu(312, 2039, 80, 300, 2.79),
    "h100": _gpu(989, 3350, 80, 450, 3.99),
    "h200": _gpu(989, 4800, 141, 450, 5.00),
    "b200": _gpu(2250, 8000, 180, 900, 6.69),
}
"""Name -> GPU, from NVIDIA's data sheets."""


@dataclass(frozen=True)
class Shape:
    """The size of a decoder with gated feed-forward layers.

    Attributes:
        layers: decoder layers.
        hidden: width of the hidden state.
        inner: width of the feed-forward layers.
        heads: heads of queries.
        key_heads: heads of keys and values.
        head: width of a head.
        vocabulary: tokens.
        tied: whether the output layer is the embedding.
    """

    layers: int
    hidden: int
    inner: int
    heads: int
    key_heads: int
    head: int
    vocabulary: int
    tied: bool = False

    @property
    def attention_width(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head

    @property
    def key_width(self) -> int:
        """Width of all keys of a token."""
        return self.key_heads * self.head

    @property
    def matrices(self) -> Mapping[str, tuple[int, int]]:
        """Inputs and outputs of each matrix of a layer, by the names that Llama gives them."""
        hidden, inner = self.hidden, self.inner
        return {
            "q_proj": (hidden, self.attention_width),
            "k_proj": (hidden, self.key_width),
            "v_proj": (hidden, self.key_width),
            "o_proj": (self.attention_width, hidden),
            "gate_proj": (hidden, inner),
            "up_proj": (hidden, inner),
            "down_proj": (inner, hidden),
        }

    @property
    def layer_weights(self) -> int:
        """Entries of the matrices of one layer."""
        return sum(inputs * outputs for inputs, outputs in self.matrices.values())

    @property
    def weights(self) -> int:
        """Entries of the matrices of all layers."""
        return self.layers * self.layer_weights

    @property
    def parameters(self) -> int:
        """Entries of the whole model, but for its norms."""
        return self.weights + (1 if self.tied else 2) * self.vocabulary * self.hidden

    def sides(self, names: Iterable[str]) -> int:
        """Inputs and outputs of some matrices of a layer together."""
        return sum(sum(self.matrices[name]) for name in names)


SHAPES: Mapping[str, Shape] = {
    "1B": Shape(16, 2048, 8192, 32, 8, 64, 128256, tied=True),
    "3B": Shape(28, 3072, 8192, 24, 8, 128, 128256, tied=True),
    "8B": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "14B": Shape(48, 5120, 13824, 40, 8, 128, 152064),
    "32B": Shape(64, 5120, 27648, 40, 8, 128, 152064),
    "70B": Shape(80, 8192, 28672, 64, 8, 128, 128256),
}
"""Name -> shape, from the configurations of Llama 3.2 1B and 3B, Llama 3.1 8B and 70B, and
Qwen2.5 14B and 32B."""
