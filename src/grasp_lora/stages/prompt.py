"""Stage `prompt`: the bare backbone as a result -> the text that goes ahead of every question.

Option `shots` is the number of solved examples; without it nothing goes ahead. The folder holds
`prompt.json`: the text, the ids of the solved examples, and how many were asked for.
"""

import time
from collections.abc import Mapping
from typing import Any

from grasp_lora.base.files import PROMPT_FILE, write_json
from grasp_lora.base.words import without_home
from grasp_lora.stages.few_shot import DRAWN_FROM, JUDGING, few_shot
from grasp_lora.stages.stage import Cost, Kind, Sizes, Split, Stage, Work
from grasp_lora.workbench.processes import is_main


def run(work: Work) -> Mapping[str, Any]:
    """Write the text.

    Raises:
        NotApplicable: as in `few_shot`.
    """
    began, wanted = time.perf_counter(), work.stage.option("shots", 0)
    found: dict[str, Any] = {"prompt": "", "wanted": 0, "used": 0, "ids": [], "tokens": 0}
    if wanted:
        tests = work.context.data.test_sets().values()
        shots = few_shot(work.context, wanted, (*tests, *JUDGING))
        found = {"prompt": "".join(one.text for one in shots.solved)} | dict(shots.record())
    if is_main():
        write_json(work.out / PROMPT_FILE, found | {"model": without_home(work.config.model.name)})
    return {"seconds": time.perf_counter() - began}


def _settings(stage: Stage) -> tuple[str, ...]:
    encoding = ("data.task", "data.max_length", "data.chat", "data.target.prompt")
    return ("seed", "model", *encoding, "data.target.language")


def _examples(stage: Stage, known: tuple[Split, ...]) -> tuple[Split, ...]:
    tests = tuple(one for one in known if one[0] == "tests" or one == ("target", "test"))
    return (DRAWN_FROM, *JUDGING, *tests)


def _cost(_stage: Stage, _sizes: Sizes) -> Cost:
    return Cost()


PROMPT = Kind(1, _settings, _examples, run, _cost)
