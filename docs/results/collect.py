"""Tables of several evaluations: python docs/results/collect.py CONFIG FOLDER

FOLDER holds one `grasp-lora evaluate` folder a system, called as in SYSTEMS. Writes scores.json
beside them (every system with its scores, and the paired tests of `final` against each) and prints
the tables and sentences of a report.
"""

import sys
from pathlib import Path

from grasp_lora.base.files import read_json, write_json
from grasp_lora.config.run_config import load_config
from grasp_lora.report.run import comparison, scores_markdown
from grasp_lora.scoring.sets import compare_evaluations, rows_by_set, score_sets
from grasp_lora.workbench.rows import load_run_data

SYSTEMS = {
    "zero-shot": "zero-shot",
    "source": "source adapter",
    "source-finetuned": "source adapter, fine-tuned on target",
    "target": "target adapter",
    "merged": "merged, untrained",
    "merged-finetuned": "merged, fine-tuned unpruned",
    "final": "final: merged, pruned, fine-tuned",
}


def main() -> None:
    config, folder = load_config(sys.argv[1]), Path(sys.argv[2])
    sets = load_run_data(config, lambda _line: None).test_sets()
    loss = read_json(folder / "final/scores.json")["sets"]["test"]["scores"]["loss"]
    tokenizer = loss["settings"]["tokenizer"]
    found = {
        slug: score_sets(config, sets, rows_by_set(folder / slug), tokenizer, "cpu")[0]
        for slug in SYSTEMS
    }
    scores = {
        "task": config.data.task,
        "language": config.data.target.language,
        "seed": config.seed,
        "systems": [{"slug": slug, "name": name} | found[slug] for slug, name in SYSTEMS.items()],
        "comparisons": {
            slug: compare_evaluations(config, folder / "final", folder / slug, sets, tokenizer)
            for slug in SYSTEMS
            if slug != "final"
        },
    }
    write_json(folder / "scores.json", scores)
    for name in sets:
        print(f"test set {name}\n")
        print(scores_markdown(scores, name))
        print(comparison(scores, name))


if __name__ == "__main__":
    main()
