"""What engines make of a PEFT adapter folder: a line for everything that they refuse or get wrong.

Read from their sources in 2026-11. llama.cpp means its converter of adapters, which reads the
global alpha and lets llama.cpp divide by the rank of each tensor.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open

from grasp_lora.adapters.folder import adapter_in, read_config_file, weights_files
from grasp_lora.base.files import ENCODER_DECODER_TASK
from grasp_lora.base.words import shown, shown_path
from grasp_lora.report.card import SERVED_RANKS


@dataclass(frozen=True)
class Foreign:
    """What an adapter folder says, read without a model and without the values of its tensors.

    Attributes:
        config: content of `adapter_config.json`.
        ranks: module -> rank of its tensors.
        scalings: module -> factor on B A, as PEFT computes it.
        others: names of tensors that are no factors of a linear module.
    """

    config: Mapping[str, Any]
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    others: tuple[str, ...]

    def wrong(self, scaling: Callable[[int], float]) -> str | None:
        """Return how many modules an engine scales wrongly; None if all are right.

        Args:
            scaling: rank of a module's tensors -> the factor that the engine uses.
        """
        apart = {
            name: (scaling(rank), self.scalings[name])
            for name, rank in self.ranks.items()
            if not math.isclose(scaling(rank), self.scalings[name], rel_tol=1e-6)
        }
        if not apart:
            return None
        name, (used, right) = next(iter(apart.items()))
        return (
            f"{len(apart)} of {len(self.ranks)} modules would be scaled wrongly, without a word: "
            f"{name} by {used:g} in place of {right:g}"
        )


def foreign_adapter(folder: Path) -> Foreign:
    """Return what a PEFT adapter folder says.

    Raises:
        FileNotFoundError, ValueError: it holds no adapter, or its files are damaged.
    """
    folder = adapter_in(folder)
    config = read_config_file(folder)
    ranks: dict[str, int] = {}
    others: list[str] = []
    for key, shape in _shapes(folder).items():
        module, side, end = key.rpartition(".lora_A.weight")
        if side and not end:
            ranks[module.removeprefix("base_model.model.")] = shape[0]
        elif not key.endswith(".lora_B.weight"):
            others.append(key)
    return Foreign(config, ranks, _scalings(config, ranks), tuple(others))


def _shapes(folder: Path) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for file in weights_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                shapes |= {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
        except SafetensorError as error:
            raise ValueError(
                f"{shown_path(file)} is damaged or cut short ({error}); copy it again"
            ) from error
    return shapes


def _scalings(config: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    alphas = config.get("alpha_pattern") or {}
    divided = math.sqrt if config.get("use_rslora") else float
    return {
        name: alphas.get(get_pattern_key(list(alphas), name), config.get("lora_alpha", 0))
        / divided(rank)
        for name, rank in ranks.items()
    }


def faults_for(engine: str, folder: Path) -> list[str]:
    """Return a line for everything in an adapter folder that an engine refuses or gets wrong.

    Args:
        engine: a key of `ENGINES`.
        folder: a PEFT adapter folder, of any origin.

    Raises:
        FileNotFoundError, ValueError: see `foreign_adapter`; or there is no such engine.
    """
    if engine not in ENGINES:
        raise ValueError(f"no engine {shown(engine)} is known; give one of: {', '.join(ENGINES)}")
    one = foreign_adapter(folder)
    kind = one.config.get("peft_type")
    if kind != "LORA":
        return [f"peft_type is {shown(kind)}; it reads LORA alone"]
    return [*_of_all(one), *ENGINES[engine](one)]


def _of_all(one: Foreign) -> list[str]:
    """Return what none of the engines can use."""
    found = []
    if one.config.get("task_type") == ENCODER_DECODER_TASK:
        found.append(
            f"task_type is {ENCODER_DECODER_TASK}: it is not known to serve adapters of "
            "encoder-decoders"
        )
    for name, words in _USED_BY_NONE.items():
        value = one.config.get(name)
        if value and value != "none":
            found.append(f"{name}={shown(value)}: {words}")
    if one.others and not found:
        found.append(
            f"{len(one.others)} tensors are no factors of linear modules, first {one.others[0]}"
        )
    return found


_USED_BY_NONE: Mapping[str, str] = {
    "use_dora": "the magnitudes of DoRA are not read",
    "lora_bias": "a bias inside the factors is not read",
    "bias": "trained biases are not read",
    "modules_to_save": "modules that were trained in full are not read",
    "trainable_token_indices": "trained tokens are not read",
    "layer_replication": "replicated layers are not known",
    "target_parameters": "LoRA on bare parameters is not read",
}


def _llama_cpp(one: Foreign) -> list[str]:
    alpha = one.config.get("lora_alpha", 0)
    wrong = one.wrong(lambda rank: alpha / rank if alpha else 1.0)
    return [] if wrong is None else [f"the global lora_alpha alone is read: {wrong}"]


def _vllm(one: Foreign) -> list[str]:
    r, alpha = one.config.get("r", 0), one.config.get("lora_alpha", 0)
    largest = max(one.ranks.values(), default=0)
    found = []
    if largest > r:
        found.append(f"a tensor has rank {largest}, above r={r}: before 0.32 it fails on the shape")
    if largest > SERVED_RANKS[-1]:
        found.append(f"rank {largest} is above {SERVED_RANKS[-1]}, the largest that it serves")
    used = alpha / (math.sqrt(r) if one.config.get("use_rslora") else r) if r else 0.0
    wrong = one.wrong(lambda _rank: used)
    return (
        found
        if wrong is None
        else [*found, f"before 0.32 one scale is used for all modules: {wrong}"]
    )


def _sglang(one: Foreign) -> list[str]:
    r, alpha = one.config.get("r", 0), one.config.get("lora_alpha", 0)
    found = []
    others = sorted({rank for rank in one.ranks.values() if rank != r})
    if others:
        found.append(f"tensors have the ranks {others} beside r={r}: it asserts one rank")
    wrong = one.wrong(lambda _rank: alpha / r if r else 0.0)
    return found if wrong is None else [*found, f"lora_alpha / r is used for all modules: {wrong}"]


def _mlx(one: Foreign) -> list[str]:
    del one
    return ["it reads no PEFT folder; write one that it reads with grasp-lora export --to mlx"]


ENGINES: Mapping[str, Callable[[Foreign], list[str]]] = {
    "llama.cpp": _llama_cpp,
    "vllm": _vllm,
    "sglang": _sglang,
    "mlx": _mlx,
}
"""Engine -> function that returns a line for everything that this engine gets wrong."""
