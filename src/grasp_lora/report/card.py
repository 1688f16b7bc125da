"""The model card of an adapter that goes out: `README.md` beside it, as hubs read it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from grasp_lora.base.files import ENCODER_DECODER_TASK, RESULT, read_json, write_text
from grasp_lora.base.words import fenced, in_markdown
from grasp_lora.report.run import NATIVE, TITLES
from grasp_lora.tasks.base import task_named
from grasp_lora.tasks.prompts import template_for

CARD_FILE = "README.md"
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM takes for `--max-lora-rank`."""

_TASKS: Mapping[str, str] = {
    "qa": "question-answering",
    "summarization": "summarization",
    "text-to-text": "text-generation",
}
"""Our task -> the name that hubs have for it."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PLAIN = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*")
"""Names that stand in code and in commands without quotes."""


@dataclass(frozen=True)
class CardFacts:
    """What a card says of an adapter besides what its own files say.

    Attributes:
        title: the heading.
        made: how it was made, in sentences.
        languages: language codes.
        task: name of the task; None if it is not known.
        prompt: the prompt template in force; None if it is not known.
        chat: whether prompts are put into the tokenizer's chat template.
        facts: (name, value) of further rows of the table.
        sets: test set -> metric -> its record in `scores.json`.
    """

    title: str
    made: str = ""
    languages: tuple[str, ...] = ()
    task: str | None = None
    prompt: str | None = None
    chat: bool = False
    facts: tuple[tuple[str, str], ...] = ()
    sets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def served_rank(rank: int) -> int:
    """Return the smallest rank that vLLM can be told to allow and that holds an adapter's.

    Raises:
        ValueError: the rank is above all of `SERVED_RANKS`.
    """
    for one in SERVED_RANKS:
        if rank <= one:
            return one
    raise ValueError(
        f"vLLM serves adapters up to rank {SERVED_RANKS[-1]}, this one has rank {rank}; trim it "
        "with grasp-lora export --rank"
    )


_OF_A_RUN = ("config.json", "data.json", "ratio.json", "scores.json", "provenance.json")


def facts_of_run(run: Path) -> CardFacts | None:
    """Return what the card of a run's result says, from the files of the run folder.

    Args:
        run: the folder; None is returned where it is not that of a finished run.
    """
    if not all((run / name).is_file() for name in _OF_A_RUN):
        return None
    config = read_json(run / "config.json")["config"]
    ratio, scores = read_json(run / "ratio.json"), read_json(run / "scores.json")
    data, made = config["data"], read_json(run / "provenance.json")
    recipe = run / "recipe.json"
    ships = read_json(recipe)["ships"] if recipe.exists() else "merge, prune, fine-tune"
    source, target = data["source"], data["target"]["language"]
    known = (source or {}).get("language")
    facts = [
        ("task", data["task"]),
        ("languages", f"{known} to {target}" if known else target),
        ("recipe", ships),
        ("prune ratio", _ratio_words(ratio, "recipe.json" if recipe.exists() else "")),
        *_rows_of(read_json(run / "data.json")),
        ("seed", str(made["seed"])),
        ("made with", ", ".join(f"{n} {v}" for n, v in made["packages"].items() if v)),
    ]
    final = [row for row in scores["systems"] if row["slug"] == RESULT]
    return CardFacts(
        title=f"{data['task']} in {target}",
        made=f"It was made by grasp-lora: {ships}.",
        languages=tuple(dict.fromkeys(code for code in (target, known) if code)),
        task=data["task"],
        prompt=data["target"].get("prompt") or template_for(task_named(data["task"]), target)[0],
        chat=data["chat"],
        facts=tuple(facts),
        sets=final[0]["sets"] if final else {},
    )


def _ratio_words(ratio: Mapping[str, Any], chosen: str) -> str:
    if chosen and not ratio.get("ratio"):
        return f"0 (unpruned; verdict on pruning: {ratio['verdict']})"
    return f"{ratio['ratio']:.3f} (verdict: {ratio['verdict']})"


def _rows_of(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for role in ("source", "target"):
        one = data.get(role)
        if one:
            counts = ", ".join(f"{len(ids)} {split}" for split, ids in one["splits"].items())
            origin = one["from"] if isinstance(one["from"], str) else "several files"
            rows.append((f"{role} rows", f"{counts}, from {origin}"))
    return rows


def write_card(folder: Path, facts: CardFacts | None) -> Path:
    """Write the card of an adapter beside it; return the file.

    What comes from outside is escaped, so that no text of it becomes a link, picture or element.

    Args:
        folder: an adapter folder that `write_adapter` wrote.
        facts: what the card says besides; None says no more.
    """
    facts = facts or CardFacts("A LoRA adapter")
    config, notes = (read_json(folder / n) for n in ("adapter_config.json", "grasp_lora.json"))
    named, rank = config.get("base_model_name_or_path"), config["r"]
    template = resources.files("grasp_lora.report").joinpath("card.md").read_text(encoding="utf-8")
    told = [
        *_about_base(named, notes),
        *facts.facts,
        ("modules", ", ".join(sorted({m.rsplit(".", 1)[-1] for m in config["target_modules"]}))),
    ]
    card = ModelCard.from_template(
        _head(facts, named, config),
        template_str=template,
        title=in_markdown(facts.title),
        made=in_markdown(facts.made),
        facts=[(name, in_markdown(value)) for name, value in told],
        scores=_score_rows(facts.sets),
        prompt="\n".join(fenced(facts.prompt)) if facts.prompt else "",
        chat=" It is put into the tokenizer's chat template." if facts.chat else "",
        rank=rank,
        loader=model_loader(config),
        served=config.get("task_type") != ENCODER_DECODER_TASK,
        alpha=f"{config['lora_alpha']:g}",
        base=named if named and _PLAIN.fullmatch(named) else "BASE_MODEL",
        served_rank=next((one for one in SERVED_RANKS if rank <= one), rank),
    )
    write_text(folder / CARD_FILE, str(card))
    return folder / CARD_FILE


def model_loader(config: Mapping[str, Any]) -> str:
    """Return the class of transformers that loads the base model of an adapter.

    Args:
        config: content of `adapter_config.json`.
    """
    two = config.get("task_type") == ENCODER_DECODER_TASK
    return "AutoModelForSeq2SeqLM" if two else "AutoModelForCausalLM"


def _about_base(named: str | None, notes: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("base model", named or "not named: set model.public_name")]
    file = notes.get("base_file")
    if file:
        words = (
            f"trained on the weights of the GGUF file {file['name']} (SHA-256 {file['sha256']}), "
            "dequantised; on the original weights it is not quite the same model"
        )
        rows.append(("base weights", words))
    if notes.get("base_fingerprint"):
        rows.append(("fingerprint of the base weights", notes["base_fingerprint"]))
    return rows


def _head(facts: CardFacts, named: str | None, config: Mapping[str, Any]) -> ModelCardData:
    writes_on = config.get("task_type") != ENCODER_DECODER_TASK
    on_hub = named is not None and _HUB_ID.fullmatch("/".join(named.split("/")[:2]))
    return ModelCardData(
        base_model="/".join(named.split("/")[:2]) if named and on_hub else None,
        library_name="peft",
        license="unknown",
        language=list(facts.languages) or None,
        pipeline_tag="text-generation" if writes_on else None,
        tags=["lora", "grasp-lora"],
        model_name=facts.title if facts.sets else None,
        eval_results=_eval_results(facts) or None,
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=_TASKS.get(facts.task or "", "text-generation"),
            dataset_type="private",
            dataset_name=name,
            dataset_split="test",
            metric_type=metric,
            metric_name=TITLES.get(metric, metric),
            metric_value=round(score["value"], 4),
            metric_args={n: score[n] for n in ("low", "high", "n") if score.get(n) is not None},
        )
        for name, one in facts.sets.items()
        for metric, score in one["scores"].items()
        if score["value"] is not None
    ]


def _score_rows(sets: Mapping[str, Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, one in sets.items():
        for metric, score in one["scores"].items():
            if score["value"] is None:
                continue
            digits = 3 if metric in NATIVE else 1
            low, high = score.get("low"), score.get("high")
            known = low is not None and high is not None
            rows.append(
                {
                    "test": in_markdown(name),
                    "n": one["n"],
                    "metric": TITLES.get(metric, metric),
                    "value": f"{score['value']:.{digits}f}",
                    "interval": f"{low:.{digits}f} to {high:.{digits}f}" if known else "not known",
                }
            )
    return rows
