"""What the terminal and the report say of a run's examples, in the same words."""

import json
from collections.abc import Mapping
from typing import Any


def known_line(facts: Mapping[str, Any]) -> str:
    """Return a warning of examples that the target adapter may have been trained on.

    Args:
        facts: those of `core.evidence.known.KnownRows`, with `all`, the number of examples that
            were looked at.
    """
    return (
        f"adapters.target knows {len(facts['rows'])} of {facts['all']} dev and micro-dev rows "
        f"suspiciously well (loss {facts['loss']:.3f}, and {facts['others']:.3f} at best without "
        "it): if it was trained on them, they choose for it; name them in "
        "adapters.trained_on.target"
    )


def prompt_lines(role: str, facts: Mapping[str, Any]) -> list[str]:
    """Return what a given adapter makes of the prompt in force, and the settings of a better one.

    Args:
        role: "source" or "target".
        facts: of `workbench.asked.compare_prompts`.
    """
    losses = ", ".join(f"{name} {loss:.3f}" for name, loss in facts["losses"].items())
    lines = [f"adapters.{role}, loss of {len(facts['rows'])} train answers: {losses}"]
    better = facts["better"]
    if better is None:
        return lines
    return [
        *lines,
        f"adapters.{role} knows {better['name']} better than {facts['used']}, by "
        f"{better['gain']:.3f} nats (standard error {better['error']:.3f}); to ask so, write "
        + " and ".join(better["settings"]),
    ]


def different_prompts_line(prompts: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return a line if the adapters know different prompts best; None if they know the same.

    Args:
        prompts: role -> facts of `workbench.asked.compare_prompts`.
    """
    best = {role: (one["better"] or {}).get("name", one["used"]) for role, one in prompts.items()}
    if len(set(best.values())) < 2:
        return None
    told = ", ".join(f"adapters.{role} {name}" for role, name in best.items())
    return (
        f"the adapters know different prompts best ({told}), but a merge is asked in one, which "
        "the other adapter knows less"
    )


def prompt_line(facts: Mapping[str, Any]) -> str:
    """Return a line with the prompt in force for the target, in quotes that YAML reads.

    Args:
        facts: what `data.json` has of it: `template`, and in a chat `before` and `between`, which
            the chat template puts around it.
    """
    line = f"prompt of the target examples: {json.dumps(facts['template'], ensure_ascii=False)}"
    around = [json.dumps(facts[n], ensure_ascii=False) for n in ("before", "between") if n in facts]
    return f"{line}, in a chat between {' and '.join(around)}" if around else line


def trained_on_line(role: str, facts: Mapping[str, Any]) -> str:
    """Return a line on the rows that a given adapter was trained on.

    Args:
        role: "source" or "target".
        facts: what `data.json` has of them: `from`, `rows` and `in_train`.
    """
    return (
        f"adapters.{role} was trained on the {facts['rows']} rows of {facts['from']}: "
        f"{facts['in_train']} of the target train rows are of their contexts"
    )
