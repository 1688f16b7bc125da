"""Do the readers of vLLM and SGLang take an adapter folder? Asked of their own code, without a GPU.

    pip download --no-deps vllm sglang -d wheels
    python -m benchmarks.readers runs/demo/final wheels

The two engines cannot be imported on a machine without a GPU. The modules that read an adapter need
little of them: they are taken out of the wheels and run with stand-ins for the logger and the
settings. Serving is not tried by this.
"""

import argparse
import ast
import logging
import sys
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Union

import regex
from safetensors.torch import load_file

from grasp_lora.report.card import served_rank

_NAMES_OF_VLLM = ("is_base_embedding_weights", "parse_fine_tuned_lora_name")
"""The functions of `vllm/lora/utils.py` that the readers call; the rest of it needs layers."""
_NAMES_OF_SGLANG = ("get_normalized_target_modules",)


def _stand_in(name: str, names: Mapping[str, Any]) -> None:
    module = ModuleType(name)
    vars(module).update({"__path__": [], **names})
    sys.modules[name] = module


def _module(name: str, wheel: zipfile.ZipFile, only: Iterable[str] = ()) -> ModuleType:
    """Return a module of a wheel, or some functions of it."""
    tree = ast.parse(wheel.read(f"{name.replace('.', '/')}.py"))
    if only:
        tree.body = [
            one for one in tree.body if isinstance(one, ast.FunctionDef) and one.name in only
        ]
    module = ModuleType(name)
    known = {"re": regex, "WeightsMapper": object, "Union": Union, "Iterable": Iterable}
    vars(module).update(known)
    sys.modules[name] = module
    exec(compile(tree, name, "exec"), vars(module))
    return module


def read_by_vllm(folder: Path, wheel: zipfile.ZipFile) -> str:
    """Return what vLLM makes of the folder, in words; raises what it raises."""
    log = logging.getLogger("vllm")
    vars(log)["info_once"] = log.info
    for package in ("vllm", "vllm.config", "vllm.utils", "vllm.lora", "vllm.model_executor"):
        _stand_in(package, {})
    _stand_in("vllm.model_executor.models", {})
    _stand_in("vllm.model_executor.models.utils", {"WeightsMapper": object})
    _stand_in("vllm.config.lora", {"LoRAConfig": object})
    _stand_in("vllm.logger", {"init_logger": lambda _name: log})
    _stand_in("vllm.utils.torch_utils", {"PIN_MEMORY": False})
    names = _module("vllm.lora.utils", wheel, _NAMES_OF_VLLM)
    vars(names)["get_lora_id"] = lambda: 1
    helper = _module("vllm.lora.peft_helper", wheel).PEFTHelper.from_local_dir(str(folder), None)
    helper.validate_legal(SimpleNamespace(max_lora_rank=served_rank(helper.r)))
    _module("vllm.lora.lora_weights", wheel)
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = {name.rsplit(".", 3)[-3] for name in tensors}
    loader = _module("vllm.lora.lora_model", wheel).LoRAModel
    loaded = loader.from_local_checkpoint(str(folder), expected, helper, device="cpu").loras
    apart = 0.0
    for name, one in loaded.items():
        one.optimize()
        side = {s: tensors[f"base_model.model.{name}.lora_{s}.weight"] for s in "AB"}
        wanted = side["B"] @ side["A"]
        apart = max(apart, (one.lora_b @ one.lora_a - wanted).abs().max().item())
    return f"rank {helper.r}, {len(loaded)} modules, a delta is off by at most {apart:g}"


def read_by_sglang(folder: Path, wheel: zipfile.ZipFile) -> str:
    """Return what SGLang makes of the folder's settings, in words; raises what it raises."""
    config = _module("sglang.srt.lora.lora_config", wheel).LoRAConfig(str(folder))
    names = _module("sglang.srt.lora.utils", wheel, _NAMES_OF_SGLANG)
    modules = sorted(names.get_normalized_target_modules(config.target_modules))
    scaling = config.lora_alpha / config.r
    return f"rank {config.r}, scaling {scaling:g}, modules {', '.join(modules)}"


READERS = {"vllm": read_by_vllm, "sglang": read_by_sglang}


def main() -> None:
    parser = argparse.ArgumentParser(description="Let engines' own readers read an adapter.")
    parser.add_argument("adapter", type=Path, help="a PEFT folder with alpha = rank")
    parser.add_argument("wheels", type=Path, help="a folder with wheels of vllm and sglang")
    options = parser.parse_args()
    for name, read in READERS.items():
        for file in sorted(options.wheels.glob(f"{name}-*.whl")):
            with zipfile.ZipFile(file) as wheel:
                version = file.name.split("-")[1]
                print(f"{name} {version}: {read(options.adapter, wheel)}")


if __name__ == "__main__":
    main()
