"""What exports of an adapter weigh, and what llama.cpp computes with them.

    python -m benchmarks.engines --node-llama FOLDER --json engines.json

A random adapter on all linear layers, *mixed*, has ranks 12, 4 and 2 and three scalings;
`--adapter` adds one of your own. Each is exported in every form; the first table has the bytes.

With `--node-llama`, a folder in which `npm install node-llama-cpp` has put a prebuilt llama.cpp,
the second table holds that against PEFT, in float32 on the same weights: the base's GGUF file is
written with every tensor in float32. Of each of five prompts the twenty most probable first tokens
are compared, and the first eight tokens of the greedy answer. *As its converter reads it* is what
llama.cpp's own converter makes of an adapter with patterns: its tensors as they are, and the global
alpha. The base must be a GGUF file.

JSON: `bytes` by adapter and form, `bfloat16_share` of the bytes of float32 in `peft`, and
`llama_cpp` by base, adapter and form: `difference` of a first-token probability, `same_first`,
`same_answers`.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from benchmarks import common
from grasp_lora.models.backbones import Backbone, ModelSpec, gguf_source_of
from grasp_lora.sharing.export import Request, write_export
from grasp_lora.sharing.gguf_files import layout_of, tensor_names

PROMPTS = (
    "Question: What is the capital of France?\nAnswer:",
    "La capital de España es",
    "The river Nile flows through",
    "2 + 2 =",
    "Once upon a time",
)
TOP, TOKENS = 20, 8
SCRIPT = Path(__file__).with_name("engines.mjs")
FORMS = {
    "peft, float32": ("peft", "float32"),
    "peft, bfloat16": ("peft", "bfloat16"),
    "gguf, float32": ("gguf", "float32"),
    "gguf, bfloat16": ("gguf", "bfloat16"),
    "mlx, bfloat16": ("mlx", "bfloat16"),
}
_PREFIX = "base_model.model."
_MERGED = "gguf-merged, float32"
_CONVERTED = "as its converter reads it"
_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors", "adapter.gguf")


def mixed_adapter(model: nn.Module, folder: Path) -> Path:
    """Write a random PEFT adapter of three ranks and three scalings; return its folder."""
    ranks, alphas = {"q_proj": 12, "down_proj": 2}, {"q_proj": 6, "k_proj": 16}
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules="all-linear",
        rank_pattern=ranks,
        alpha_pattern=alphas,
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(0)
    for name, factor in adapted.named_parameters():
        if "lora_" in name:
            factor.data.copy_(0.03 * torch.randn(factor.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    adapted.unload()
    return folder


def exported(adapters: Mapping[str, Path], model: str, place: Path) -> dict[str, dict[str, Path]]:
    """Return adapter -> form -> the folder that it was exported to."""
    found: dict[str, dict[str, Path]] = {}
    for name, adapter in adapters.items():
        for form, (to, dtype) in FORMS.items():
            out = place / f"{name}-{to}-{dtype}"
            write_export(Request(adapter, to, out, dtype, model=model), lambda _line: None)
            found.setdefault(name, {})[form] = out
    return found


def weights_bytes(folder: Path) -> int:
    """Return the bytes of the file that an engine reads, without what lies beside it."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.name in _WEIGHTS)


@torch.no_grad()
def read_by_peft(model: nn.Module, ids: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Return the most probable first tokens of each prompt, and the tokens of its greedy answer."""
    found: list[dict[str, Any]] = []
    for prompt in ids:
        given, first = list(prompt), None
        for _ in range(TOKENS):
            logits = model(input_ids=torch.tensor([given])).logits[0, -1].double()
            if first is None:
                most = logits.softmax(-1).topk(TOP)
                first = dict(zip(most.indices.tolist(), most.values.tolist(), strict=True))
            given.append(int(logits.argmax()))
        found.append({"first": first, "answer": given[len(prompt) :]})
    return found


def references(
    backbone: Backbone, adapters: Mapping[str, Path], ids: Sequence[Sequence[int]]
) -> dict[str, list[dict[str, Any]]]:
    """Return adapter, or "none" -> what PEFT computes."""
    found = {"none": read_by_peft(backbone.model, ids)}
    for name, folder in adapters.items():
        adapted = PeftModel.from_pretrained(backbone.model, str(folder)).eval()
        found[name] = read_by_peft(adapted, ids)
        adapted.unload()
    return found


def plain_base(source: Any, place: Path) -> Path:
    """Write the GGUF file of a base with every tensor in float32; return it."""
    reader, out = gguf.GGUFReader(source.assemble(place)), place / "base-f32.gguf"
    kind = bytes(reader.fields["general.architecture"].parts[-1]).decode()
    writer = gguf.GGUFWriter(out, kind)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            inner = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        plain = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, plain.astype("float32"))
    _finish(writer)
    return out


def as_converted(adapter: Path, layout: Any, out: Path) -> Path:
    """Write an adapter as llama.cpp's converter does: no patterns, the global alpha; return it."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    alpha = json.loads((adapter / "adapter_config.json").read_text())["lora_alpha"]
    writer = gguf.GGUFWriter(out, layout.architecture.lower())
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    keys = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight")]
    names = tensor_names(layout, {key.removeprefix(_PREFIX): key for key in keys})
    for module, name in names.items():
        A, B = (tensors[f"{_PREFIX}{module}.lora_{side}.weight"].float() for side in "AB")
        writer.add_tensor(f"{name}.lora_a", A.contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", layout.in_order(module, B).contiguous().numpy())
    _finish(writer)
    return out


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def runs_of(
    adapters: Mapping[str, Path], forms: Mapping[str, Mapping[str, Path]], base: Path, layout: Any
) -> dict[tuple[str, str], tuple[Path, Path | None]]:
    """Return (adapter, form) -> the model and the adapter file that llama.cpp reads."""
    found: dict[tuple[str, str], tuple[Path, Path | None]] = {("none", ""): (base, None)}
    for name, folder in adapters.items():
        for form, place in forms[name].items():
            if form.startswith("gguf"):
                found[name, form] = (base, place / "adapter.gguf")
        out = base.with_name(f"{name}-merged")
        request = Request(folder, "gguf-merged", out, "float32", model=str(base))
        write_export(request, lambda _line: None)
        found[name, _MERGED] = (out / "model.gguf", None)
        wrong = as_converted(folder, layout, base.with_name(f"{name}-converted.gguf"))
        found[name, _CONVERTED] = (base, wrong)
    return found


def read_by_llama_cpp(
    runs: Mapping[tuple[str, str], tuple[Path, Path | None]],
    ids: Sequence[Sequence[int]],
    node_llama: Path,
    place: Path,
) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Return what llama.cpp computes, as `read_by_peft` does but with all first tokens."""
    keys = {f"{name}/{form}": (name, form) for name, form in runs}
    asked = [
        {"label": label, "model": str(runs[key][0]), "lora": runs[key][1] and str(runs[key][1])}
        for label, key in keys.items()
    ]
    job, out = place / "job.json", place / "read.json"
    job.write_text(json.dumps({"runs": asked, "ids": ids, "tokens": TOKENS}))
    # A module finds its packages beside its file.
    script = place / SCRIPT.name
    script.write_text(SCRIPT.read_text(encoding="utf-8"), encoding="utf-8")
    (place / "node_modules").symlink_to((node_llama / "node_modules").resolve())
    command = ["node", str(script), str(job), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"node ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return {keys[label]: found for label, found in json.loads(out.read_text()).items()}


def held_against(
    wanted: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """Return the largest difference of a first token, and how many first tokens and answers agree.

    Args:
        wanted: of `read_by_peft`.
        found: of `read_by_llama_cpp`, whose tokens are texts.
    """
    pairs = list(zip(wanted, found, strict=True))
    apart = [
        abs(p - other["first"].get(str(token), 0.0))
        for one, other in pairs
        for token, p in one["first"].items()
    ]
    return {
        "difference": max(apart),
        "same_first": sum(one["answer"][0] == other["answer"][0] for one, other in pairs),
        "same_answers": sum(one["answer"] == other["answer"] for one, other in pairs),
    }


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = common.parser(__doc__)
    parser.add_argument("--adapter", type=Path, help="another adapter of this base")
    parser.add_argument("--node-llama", type=Path, metavar="DIR", help="holds node_modules")
    parser.set_defaults(dtype="float32", device="cpu")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Export, measure, print and return the result."""
    options = parsed(argv)
    common.ready(options)
    with tempfile.TemporaryDirectory() as scratch:
        place, backbone = Path(scratch), common.open_backbone(options)
        adapters = {"mixed": mixed_adapter(backbone.model, place / "mixed")}
        adapters |= {"given": options.adapter} if options.adapter else {}
        forms = exported(adapters, options.model, place)
        sizes = {
            name: {"as it was": weights_bytes(adapters[name])}
            | {form: weights_bytes(folder) for form, folder in found.items()}
            for name, found in forms.items()
        }
        lines = [(n, form, size / 1e6) for n, one in sizes.items() for form, size in one.items()]
        common.table("megabytes", ["adapter", "form", "MB"], lines)
        figures: dict[str, Any] = {
            "bytes": sizes,
            "bfloat16_share": sizes["mixed"]["peft, bfloat16"] / sizes["mixed"]["peft, float32"],
        }
        rows: list[dict[str, Any]] = [{"adapter": n, "bytes": found} for n, found in sizes.items()]
        if options.node_llama is None:
            print("llama.cpp is left out: give a folder with node-llama-cpp as --node-llama")
        else:
            found = _llama_cpp(backbone, adapters, forms, options, place)
            figures["llama_cpp"] = {common.shown(options.model): found}
            rows += [{"adapter": name} | one for name, one in found.items()]
    return common.write_result(options.json, figures, rows, options)


def _llama_cpp(
    backbone: Backbone,
    adapters: Mapping[str, Path],
    forms: Mapping[str, Mapping[str, Path]],
    options: argparse.Namespace,
    place: Path,
) -> dict[str, dict[str, Any]]:
    source = gguf_source_of(ModelSpec(options.model))
    if source is None:
        raise SystemExit(f"--node-llama needs a base in a GGUF file, not {options.model}")
    prompts = PROMPTS[:2] if options.quick else PROMPTS
    ids = [backbone.tokenizer(text).input_ids for text in prompts]
    wanted = references(backbone, adapters, ids)
    runs = runs_of(adapters, forms, plain_base(source, place), layout_of(backbone.model.config))
    read = read_by_llama_cpp(runs, ids, options.node_llama, place)
    found: dict[str, dict[str, Any]] = {}
    for (name, form), one in read.items():
        found.setdefault(name, {})[form] = held_against(wanted[name], one)
    lines = [
        (name, form, one["difference"], one["same_first"], one["same_answers"])
        for name, kinds in found.items()
        for form, one in kinds.items()
    ]
    titles = ["adapter", "form", "largest difference", "same first token", "same answer"]
    common.table(f"llama.cpp against PEFT, {len(ids)} prompts", titles, lines)
    return found


if __name__ == "__main__":
    main()
