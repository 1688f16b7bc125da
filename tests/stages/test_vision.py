"""A backbone that reads images as well: text alone trains it, and adapters may reach past that."""

from grasp_lora.base.files import read_json
from grasp_lora.config.run_config import load_config
from grasp_lora.plans.run import run
from helpers import tiny_adapter_folder, tiny_tokenizer, tiny_vision_model
from jobs import job, write_job


def test_given_adapters_of_the_vision_tower_are_pruned_by_magnitude_there(tmp_path, capsys):
    model = tiny_vision_model()
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    adapters = {
        role: str(
            tiny_adapter_folder(tmp_path / role, model, targets=["q_proj", "v_proj"], seed=seed)
        )
        for seed, role in enumerate(("source", "target"))
    }
    config = load_config(write_job(tmp_path / "run.yaml", job(tmp_path, adapters=adapters)))
    out = run(config)
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "2 of 6 adapted modules get no input from the train examples (first: model.vision_" in said
    )
    assert "magnitude is used there" in said
    assert read_json(out / "shipped" / "stage.json")["ratio"] > 0
