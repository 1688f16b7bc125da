"""Stage `shrink`: a finished adapter -> the same adapter in at most `budget_mb` megabytes.

Rank and number format of the modules are chosen by probes on micro-dev and dev examples; nothing is
trained, and test examples are not read. The folder holds a plain PEFT adapter in bf16,
`quantized.safetensors`, to which the budget applies, and `shrink.json`: what was measured, and what
was chosen for each module.

Input `adapter` is the folder of the adapter. Option `budget_mb` is the budget, in units of 10^6
bytes; the header of the file is not counted.
"""

import time
from collections.abc import Mapping
from typing import Any

from grasp_lora.adapters.folder import WEIGHTS_FILE, one_rank, read_adapter
from grasp_lora.adapters.packed import QUANTIZED_FILE, write_packed
from grasp_lora.base.files import follow_umask, write_json
from grasp_lora.core.budget import MOST_PROBES, OPTIONS, WHOLE, added
from grasp_lora.core.evidence.groups import Gain
from grasp_lora.core.packing import GROUP
from grasp_lora.stages.other_merges import NotApplicable
from grasp_lora.stages.stage import Cost, Kind, Sizes, Split, Stage, Work
from grasp_lora.workbench.merged_folder import save_plain
from grasp_lora.workbench.processes import is_main
from grasp_lora.workbench.sizes import (
    MEGABYTE,
    ROWS,
    SPLITS,
    Drawn,
    Fitted,
    OptionLosses,
    Resizable,
    check_budget,
    drawn_for_sizes,
    fitted,
    probed_options,
    resizable,
)

SHRINK_FILE = "shrink.json"


def run(work: Work) -> Mapping[str, Any]:
    """Choose, measure and write.

    Raises:
        NotApplicable: the budget is too small.
        ValueError: the adapter does not fit the backbone, there are fewer than 4 examples, or
            nothing that fits has a finite loss.
    """
    began = time.perf_counter()
    context, folder = work.context, work.inputs["adapter"]
    megabytes = work.stage.options["budget_mb"]
    try:
        budget = check_budget(megabytes, read_adapter(folder, context.backbone.model).adapter)
    except ValueError as error:
        raise NotApplicable(str(error)) from None
    drawn = drawn_for_sizes(context)
    with resizable(context, folder) as sizes, context.clock.span("probe"):
        (as_it_is,) = sizes.losses([None], drawn)
        found, chosen = _chosen(work, sizes, drawn, budget)
        modules = sizes.packed(chosen.choice)
        told = _record(sizes, drawn, found, chosen, as_it_is)
    plain = {name: one.factors() for name, one in modules.items()}
    size = sum(one["bytes"] for one in told["modules"].values())
    filled = sum(side.nbytes for pair in one_rank(plain).values() for side in pair)
    about = {"budget_mb": megabytes, "bytes": size, "plain_bytes": filled}
    if is_main():
        with context.clock.span("write"):
            save_plain(work.out, plain, context.backbone)
            write_packed(work.out, modules)
            write_json(work.out / SHRINK_FILE, about | told)
            follow_umask(work.out, work.out / SHRINK_FILE)
    for line in _lines(about | told):
        context.reporter.say(line)
    probes = 2 + sum(map(len, found.singles.values())) + len(chosen.tried)
    return {
        "seconds": time.perf_counter() - began,
        "forwards": probes * len(drawn.ids),
        "bytes": size,
    }


def _chosen(work: Work, sizes: Resizable, drawn: Drawn, budget: int) -> tuple[OptionLosses, Fitted]:
    """Return the losses of single options, none if the whole adapter fits, and the choice."""
    whole = sizes.uniform(WHOLE)
    if sizes.bytes_of(whole) <= budget:
        (base,) = sizes.losses([whole], drawn)
        return OptionLosses(drawn.groups, base, {}), Fitted(whole, base, "whole", {}, None)
    with work.context.reporter.bar("options", len(sizes.parts)) as done:
        found = probed_options(sizes, drawn, done)
    return found, fitted(sizes, found, drawn, budget)


def _record(
    sizes: Resizable, drawn: Drawn, found: OptionLosses, chosen: Fitted, as_it_is: list[float]
) -> dict[str, Any]:
    """Return what `shrink.json` says beside budget and bytes."""

    def told(losses: list[float], base: list[float]) -> dict[str, Any]:
        return {**_gain(added(losses, base, drawn.groups)), "losses": losses}

    options = {
        part: {
            option.name: {"bytes": sizes.size(part, option), **told(losses, found.base)}
            for option, losses in own.items()
        }
        for part, own in found.singles.items()
    }
    return {
        "rows": drawn.ids,
        "groups": drawn.groups,
        "scale_group": GROUP,
        "as_it_is": as_it_is,
        "bf16": {
            "bytes": sizes.bytes_of(sizes.uniform(WHOLE)),
            **told(found.base, as_it_is),
        },
        "options": options,
        "chosen_by": chosen.by,
        "whole": {
            **told(chosen.losses, as_it_is),
            "beyond_the_sum": None if chosen.excess is None else _gain(chosen.excess),
        },
        "wholes": {name: told(losses, as_it_is) for name, losses in chosen.tried.items()},
        "modules": _modules(sizes, found, chosen),
    }


def _modules(sizes: Resizable, found: OptionLosses, chosen: Fitted) -> dict[str, Any]:
    """Return module -> its option, bytes, and what its group's probe of that option added."""
    told: dict[str, Any] = {}
    for part, option in chosen.choice.items():
        probe = _gain(found.added(part, option))
        for name in sizes.parts[part]:
            shape = sizes.shapes[name]
            told[name] = {
                "group": part,
                "option": option.name,
                "rank": option.rank(shape.rank),
                "bytes": option.size([shape]),
                **probe,
            }
    return told


def _gain(gain: Gain) -> dict[str, float]:
    return {"added": gain.gain, "standard_error": gain.error}


def _lines(told: Mapping[str, Any]) -> list[str]:
    """Return what was chosen for each group, what it costs, and the sizes of both files."""
    groups = {one["group"]: one for one in told["modules"].values()}
    whole, before = told["whole"], told["bf16"]["bytes"]
    return [
        *(f"{part}: {one['option']}, alone {_nats(one)}" for part, one in groups.items()),
        f"{told['bytes'] / MEGABYTE:.3f} MB in {QUANTIZED_FILE} in place of {before / MEGABYTE:.3f}"
        f" MB in bf16: {_nats(whole)} on the {len(told['rows'])} examples that chose",
        f"{told['plain_bytes'] / MEGABYTE:.3f} MB in {WEIGHTS_FILE}, the same in bf16 and one rank",
    ]


def _nats(one: Mapping[str, float]) -> str:
    return f"{one['added']:+.4f} nats (standard error {one['standard_error']:.4f})"


def _settings(stage: Stage) -> tuple[str, ...]:
    encoding = ("data.task", "data.max_length", "data.chat", "data.target.prompt")
    return ("seed", "model", "evaluate.batch_size", *encoding)


def _pool(_stage: Stage, _known: tuple[Split, ...]) -> tuple[Split, ...]:
    return tuple(("target", split) for split in SPLITS)


def _cost(stage: Stage, sizes: Sizes) -> Cost:
    pool = _pool(stage, ())
    # Beside single options: the adapter as it is and in bf16, the whole, and each option for all.
    wholes = 3 + sum(option.part > 0 for option in OPTIONS)
    count = (MOST_PROBES + wholes) * min(ROWS, sizes.examples(*pool))
    return Cost(0, round(count * sizes.length(*pool)), count)


SHRINK = Kind(1, _settings, _pool, run, _cost)
