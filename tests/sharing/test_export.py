"""Exports are read back by readers that are not ours, and compared with PEFT on the same base."""

import copy
import json
import shlex

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp_lora.adapters.folder import read_adapter, write_adapter
from grasp_lora.base.files import write_json
from grasp_lora.core.lora import LoraFactors
from grasp_lora.sharing.export import Request, write_export
from grasp_lora.sharing.factors import ready
from grasp_lora.sharing.gguf_files import Layout, write_gguf_merged
from helpers import (
    logits_of,
    random_ids,
    tiny_adapter_folder,
    tiny_backbone_folder,
    tiny_bloom_model,
    tiny_model,
)

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with a base and a foreign adapter of three ranks and scalings."""
    folder = tmp_path_factory.mktemp("export")
    tiny_backbone_folder(folder / "base")
    tiny_adapter_folder(
        folder / "mixed",
        tiny_model(),
        r=4,
        targets=TARGETS,
        rank_pattern={"k_proj": 2, "up_proj": 6},
        alpha_pattern={"k_proj": 5, "up_proj": 3},
    )
    return folder


def written(place, tmp_path, to, adapter="mixed", **options):
    lines = []
    options = {"dtype": "float32", "model": str(place / "base")} | options
    out = write_export(Request(place / adapter, to, tmp_path / "out", **options), lines.append)
    return out, lines


def plain_logits(place, adapter):
    model = PeftModel.from_pretrained(copy.deepcopy(tiny_model()), adapter)
    return logits_of(model, random_ids())


def deltas_of(place):
    adapter = read_adapter(place / "mixed").adapter
    return {n: f.scaling * (f.B.double() @ f.A.double()) for n, f in adapter.items()}


def test_peft_gets_one_rank_and_the_same_logits(place, tmp_path):
    out, lines = written(place, tmp_path, "peft", public_name="owner/name")
    about = json.loads((out / "adapter_config.json").read_text())
    assert (about["r"], about["lora_alpha"]) == (6, 6)
    assert about["rank_pattern"] == about["alpha_pattern"] == {}
    assert about["base_model_name_or_path"] == "owner/name"
    torch.testing.assert_close(plain_logits(place, out), plain_logits(place, place / "mixed"))
    assert lines[-1].startswith("read back: the deltas differ from the adapter's by ")
    assert float(lines[-1].split(" by ")[1].split()[0]) < 1e-6
    assert (out / "serve.txt").read_text() == (
        "vllm serve owner/name --enable-lora --max-lora-rank 8 --lora-modules adapter=./out\n"
    )
    assert {file.name for file in out.iterdir()} == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "grasp_lora.json",
        "serve.txt",
    }


def test_bfloat16_is_half_the_size_and_its_error_is_told(place, tmp_path):
    (tmp_path / "full").mkdir()
    half, lines = written(place, tmp_path, "peft", dtype="bfloat16")
    full, _ = written(place, tmp_path / "full", "peft")
    tensors = load_file(half / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    whole = load_file(full / "adapter_model.safetensors")
    assert 2 * sum(t.nbytes for t in tensors.values()) == sum(t.nbytes for t in whole.values())
    told = next(line for line in lines if line.startswith("read back"))
    assert 1e-4 < float(told.split(" by ")[1].split()[0]) < 1e-2


def test_a_card_goes_along_unless_it_says_another_base_or_rank(place, tmp_path):
    first, _ = written(place, tmp_path, "peft", public_name="owner/name")
    card = first / "README.md"
    card.write_text(card.read_text(encoding="utf-8") + "mine\n", encoding="utf-8")

    def again(name, **options):
        out = write_export(Request(first, "peft", tmp_path / name, **options), lambda _line: None)
        return (out / "README.md").read_text(encoding="utf-8")

    assert again("same").endswith("mine\n")
    trimmed = again("trimmed", rank=2)
    assert "mine" not in trimmed
    assert "has rank 2 and alpha 2" in trimmed
    assert "base_model: owner/other" in again("renamed", public_name="owner/other")


def test_a_local_path_does_not_go_out(place, tmp_path):
    named = tiny_adapter_folder(tmp_path / "named", tiny_model())
    file = named / "adapter_config.json"
    content = json.loads(file.read_text()) | {"base_model_name_or_path": str(place / "base")}
    file.write_text(json.dumps(content))
    lines = []
    out = write_export(Request(named, "peft", tmp_path / "out"), lines.append)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    assert not [f.name for f in out.iterdir() if str(place).encode() in f.read_bytes()]
    assert "--public-name owner/name" in lines[-1]


@pytest.mark.parametrize("rank", [1, 3])
def test_trimming_is_the_truncated_svd_and_tells_each_error(place, tmp_path, rank):
    out, lines = written(place, tmp_path, "peft", rank=rank)
    told = dict(line.split() for line in lines if line.startswith("  "))
    seen = read_adapter(out).adapter
    for name, delta in deltas_of(place).items():
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        trimmed = seen[name].B.double() @ seen[name].A.double()
        torch.testing.assert_close(trimmed, best, atol=1e-6, rtol=1e-5)
        error = float((delta - best).norm() / delta.norm())
        assert float(told[name]) == pytest.approx(error, abs=1e-3)
        assert seen[name].A.shape[0] == min(rank, 2 if "k_proj" in name else rank)


def test_a_tolerance_takes_the_lowest_rank_that_keeps_to_it(place, tmp_path):
    out, _ = written(place, tmp_path, "peft", tolerance=0.5)
    rank = next(iter(read_adapter(out).adapter.values())).A.shape[0]

    def worst(kept):
        lost = [
            torch.linalg.svdvals(one)[kept:].norm() / one.norm()
            for one in deltas_of(place).values()
        ]
        return float(max(lost))

    assert worst(rank) <= 0.5 < worst(rank - 1)


def test_modules_keep_their_own_ranks(place, tmp_path):
    """What is trained or pruned later must not take the zeros that fill a module up."""
    (tmp_path / "trimmed").mkdir()
    ranks = {"q_proj": 4, "k_proj": 2, "v_proj": 4, "up_proj": 6}
    for where, rank, most in (("", None, 6), ("trimmed", 3, 3)):
        out, _ = written(place, tmp_path / where, "peft", rank=rank)
        seen = {
            name.rsplit(".", 1)[-1]: one.rank for name, one in read_adapter(out).adapter.items()
        }
        assert seen == {name: min(own, most) for name, own in ranks.items()}


def finished_run(folder):
    """Return the folder of a finished run whose result and merge are the same adapter."""
    score = {"exact_match": {"value": 34.0, "low": 26.9, "high": 41.7, "n": 9}}
    system = {"slug": "final", "sets": {"test": {"n": 9, "scores": score}}}
    data = {"task": "qa", "chat": False, "source": None, "target": {"language": "es"}}
    write_json(folder / "config.json", {"config": {"data": data}})
    write_json(folder / "data.json", {})
    write_json(folder / "ratio.json", {"ratio": 0.4, "verdict": "flat"})
    write_json(folder / "scores.json", {"systems": [system]})
    write_json(folder / "provenance.json", {"seed": 1, "packages": {}})
    for name in ("final", "merged"):
        tiny_adapter_folder(folder / name, tiny_model(), r=4)
    return folder


def test_scores_of_a_run_stand_on_the_card_of_its_result_alone(tmp_path):
    run = finished_run(tmp_path / "run")

    def card(name, rank=None):
        request = Request(run / name, "peft", tmp_path / f"{name}-{rank}", rank=rank)
        return (write_export(request, lambda _line: None) / "README.md").read_text(encoding="utf-8")

    assert "34.0" in card("final")
    assert "No scores are known" in card("merged")
    trimmed = card("final", rank=2)
    assert "No scores are known" in trimmed
    assert "| trimmed | to rank 2, by singular values; " in trimmed
    assert "| prune ratio | 0.400 (verdict: flat) |" in trimmed


def test_what_float16_cannot_hold_is_refused(tmp_path):
    model = tiny_model()
    module = "model.layers.0.self_attn.q_proj"
    pair = (torch.full((1, 16), 1e5), torch.full((16, 1), 1e-3))
    folder = write_adapter(
        tmp_path / "wide", {module: pair}, model=model, base_name=None, fingerprint=None
    )
    for to in ("peft", "mlx"):
        with pytest.raises(ValueError, match="values up to 1e.05, but float16 ends at 6.55e.04"):
            write_export(Request(folder, to, tmp_path / "out", dtype="float16"), lambda _line: None)
    write_export(Request(folder, "peft", tmp_path / "out", dtype="bfloat16"), lambda _line: None)


def test_commands_quote_the_names_in_them(place, tmp_path):
    named = tiny_adapter_folder(tmp_path / "named", tiny_model())
    file = named / "adapter_config.json"
    base = 'own"er/na$(date)me'
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    out = write_export(Request(named, "peft", tmp_path / "my out"), lambda _line: None)
    line = (out / "serve.txt").read_text()
    assert shlex.split(line)[2] == base
    assert shlex.split(line)[-1] == "adapter=./my out"
    code = (out / "README.md").read_text(encoding="utf-8").split("## How to load")[1]
    assert "date" not in code
    assert 'from_pretrained("BASE_MODEL")' in code


def test_rows_that_no_heads_divide_are_refused():
    with pytest.raises(
        ValueError, match="has 6 rows, which the base model's 4 heads do not divide"
    ):
        Layout("llama", 2, 4, 2).in_order("model.layers.0.self_attn.q_proj", torch.zeros(6, 1))


def test_a_merged_file_keeps_the_alignment_of_its_base(tmp_path):
    model, module = tiny_model(), "model.layers.0.self_attn.v_proj"
    weight = model.get_submodule(module).get_parameter("weight").detach()
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "llama")
    writer.add_custom_alignment(128)
    other = torch.arange(5.0)
    writer.add_tensor("output_norm.weight", other.numpy())
    writer.add_tensor("blk.0.attn_v.weight", weight.numpy())
    for end in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{end}_to_file")()
    writer.close()
    pair = (torch.ones(1, weight.shape[1]), torch.ones(weight.shape[0], 1))
    made = ready({module: LoraFactors(*pair, 1.0)})
    layout = Layout("llama", 2, 2, 1)
    write_gguf_merged(tmp_path, tmp_path / "base.gguf", made, layout, torch.float32)
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert torch.equal(torch.tensor(tensors["output_norm.weight"]), other)
    torch.testing.assert_close(torch.tensor(tensors["blk.0.attn_v.weight"]), weight + 1)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma3_text"])
def test_a_merged_model_has_the_logits_of_the_adapter_on_its_base(tmp_path, arch):
    base = tiny_backbone_folder(tmp_path / "base", arch)
    adapter = tiny_adapter_folder(tmp_path / "adapter", tiny_model(arch))
    lines = []
    request = Request(adapter, "merged", tmp_path / "out", "float32", model=str(base))
    out = write_export(request, lines.append)
    again = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    with_peft = PeftModel.from_pretrained(copy.deepcopy(tiny_model(arch)), adapter)
    ids = random_ids()
    torch.testing.assert_close(
        logits_of(again, ids), logits_of(with_peft, ids), atol=1e-4, rtol=1e-4
    )
    assert "the same best token at" in lines[-1]
    assert (out / "tokenizer.json").is_file()
    if arch == "llama":  # older readers look for it at the top
        about = json.loads((out / "config.json").read_text())
        assert about["rope_theta"] == about["rope_parameters"]["rope_theta"]


def as_llama_cpp(rows, heads):
    """Return the rows of q or k as llama.cpp has them: pairs of a rotation lie side by side."""
    size = len(rows) // heads
    order = [
        h * size + half * (size // 2) + i
        for h in range(heads)
        for i in range(size // 2)
        for half in (0, 1)
    ]
    return rows[order]


def test_a_gguf_adapter_holds_the_deltas_in_the_order_of_llama_cpp(place, tmp_path):
    out, lines = written(place, tmp_path, "gguf")
    reader = gguf.GGUFReader(out / "adapter.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    tensors = {one.name: torch.tensor(one.data.copy()).double() for one in reader.tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "up_proj": "ffn_up"}
    assert len(tensors) == 2 * 2 * len(names)
    heads = {"q_proj": 2, "k_proj": 1}
    for module, delta in deltas_of(place).items():
        number, last = module.split(".")[2], module.rsplit(".", 1)[-1]
        a, b = (tensors[f"blk.{number}.{names[last]}.weight.lora_{side}"] for side in "ab")
        seen = fields["adapter.lora.alpha"] / b.shape[1] * (b @ a)
        expected = as_llama_cpp(delta, heads[last]) if last in heads else delta
        torch.testing.assert_close(seen, expected, atol=1e-6, rtol=1e-5)
    assert (
        (out / "serve.txt").read_text().startswith("llama-server -m BASE_MODEL.gguf --lora ./out/")
    )


def test_the_order_of_rows_is_undone_when_a_file_is_read():
    layout = Layout("llama", 2, 4, 2)
    rows = torch.arange(32)[:, None]
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"):
        there = layout.in_order(name, rows)
        assert not torch.equal(there, rows)
        assert torch.equal(layout.out_of_order(name, there), rows)


def test_mlx_adds_x_a_b_times_the_scale(place, tmp_path):
    out, _ = written(place, tmp_path, "mlx")
    about = json.loads((out / "adapter_config.json").read_text())
    assert about["fine_tune_type"] == "lora"
    found = about["lora_parameters"]
    assert sorted(found["keys"]) == sorted(
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"]
    )
    tensors = load_file(out / "adapters.safetensors")
    for name, delta in deltas_of(place).items():
        a, b = (tensors[f"{name}.lora_{side}"].double() for side in "ab")
        assert a.shape[1] == b.shape[0] == found["rank"] == 6
        torch.testing.assert_close(found["scale"] * (a @ b).T, delta, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "onnx"}, "--to 'onnx' is unknown; give one of: peft, merged"),
        ({"dtype": "int8"}, "--dtype 'int8': give one of"),
        ({"rank": 2, "tolerance": 0.1}, "give one of them"),
        ({"rank": 0}, "--rank 0 is no rank"),
        ({"tolerance": 1.5}, "--tolerance 1.5 is outside"),
        ({"to": "gguf-merged"}, "give it with --model FILE.gguf"),
    ],
)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(place, tmp_path, changes, message):
    options = {"to": "peft"} | changes
    with pytest.raises(ValueError, match=message):
        written(place, tmp_path, options.pop("to"), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_taken_place_is_refused(place, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is there already; choose another folder"):
        written(place, tmp_path, "peft")


def test_models_of_another_layout_are_refused_for_gguf(place, tmp_path):
    tiny_bloom_model().save_pretrained(tmp_path / "bloom")
    with pytest.raises(ValueError, match="models of type 'bloom' cannot be written as GGUF"):
        written(place, tmp_path, "gguf", model=str(tmp_path / "bloom"))


def test_a_rank_above_those_of_vllm_is_told(tmp_path):
    model = tiny_model()
    module = "model.layers.0.self_attn.q_proj"
    pair = (torch.ones(513, 16), torch.ones(16, 513))
    folder = write_adapter(
        tmp_path / "wide", {module: pair}, model=model, base_name=None, fingerprint=None
    )
    out = write_export(Request(folder, "peft", tmp_path / "out"), lambda _line: None)
    assert "up to rank 512: trim this one with --rank" in (out / "serve.txt").read_text()
