"""Adapter folders merged into one trainable adapter: its delta is the weighted sum of theirs."""

import pytest
import torch
from peft import PeftModel

from grasp_lora.adapters.folder import read_adapter
from grasp_lora.adapters.merging import merge_adapters, source_ranks
from helpers import logits_of, random_ids, tiny_adapter_folder, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("adapters")
    model = tiny_model()
    return [
        tiny_adapter_folder(place / "a", model, r=2, alpha=6, seed=1),
        tiny_adapter_folder(
            place / "b", model, r=5, seed=2, use_rslora=True, targets=["q_proj", "up_proj"]
        ),
    ]


def summed(folders, weights) -> torch.nn.Module:
    """Return the base model with the weighted deltas added to its weights."""
    model = tiny_model()
    modules = dict(model.named_modules())
    with torch.no_grad():
        for folder, weight in zip(folders, weights, strict=True):
            for name, factors in read_adapter(folder).adapter.items():
                modules[name].weight += weight * factors.scaling * factors.B @ factors.A
    return model


@pytest.mark.parametrize("weights", [None, [0.3, -0.7], (1.0, 0.0)])
def test_a_merge_is_the_weighted_sum(folders, weights):
    merged = merge_adapters(tiny_model(), [str(f) for f in folders], weights=weights)
    reference = summed(folders, weights or [0.5, 0.5])
    ids = random_ids()
    assert torch.allclose(logits_of(merged.eval(), ids), logits_of(reference, ids), atol=1e-5)
    trained = [n for n, p in merged.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)


def test_a_saved_merge_loads_in_plain_peft(folders, tmp_path):
    merged = merge_adapters(tiny_model(), folders)
    merged.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    ids = random_ids()
    assert torch.allclose(logits_of(loaded.eval(), ids), logits_of(merged.eval(), ids), atol=1e-6)


def test_the_ranks_of_the_sources_are_known_where_they_lie_side_by_side(folders):
    ranks = source_ranks(merge_adapters(tiny_model(), folders), "default")
    assert ranks["model.layers.0.self_attn.q_proj"] == {0: 2, 1: 5}
    assert ranks["model.layers.0.self_attn.v_proj"] == {0: 2}
    assert ranks["model.layers.1.mlp.up_proj"] == {1: 5}
    assert source_ranks(merge_adapters(tiny_model(), folders, kind="svd"), "default") is None


@pytest.mark.parametrize(
    ("adapters", "settings", "said"),
    [
        ("folder", {}, "adapters must be a list of adapter folders, got 'folder'"),
        ([], {}, "adapters must be a list of adapter folders"),
        (2, {"weights": [1.0]}, "a merge needs one weight per adapter, got 1 weights for 2"),
        (2, {"kind": "sum"}, "unknown merge kind 'sum'"),
    ],
)
def test_what_cannot_be_merged_is_refused(folders, adapters, settings, said):
    with pytest.raises(ValueError, match="adapters|merge") as told:
        merge_adapters(tiny_model(), folders if adapters == 2 else adapters, **settings)
    assert said in str(told.value)


def test_an_adapter_of_another_model_is_refused_by_its_folder(folders):
    with pytest.raises(ValueError, match="but A is"):
        merge_adapters(tiny_model(width=8), folders)
