"""The table of all kinds of stages."""

from collections.abc import Mapping

from grasp_lora.stages.evaluate import EVALUATE
from grasp_lora.stages.merge import MERGE
from grasp_lora.stages.probe import PROBE
from grasp_lora.stages.prompt import PROMPT
from grasp_lora.stages.prune import PRUNE
from grasp_lora.stages.search import SEARCH
from grasp_lora.stages.shrink import SHRINK
from grasp_lora.stages.stage import Kind
from grasp_lora.stages.train import TRAIN

KINDS: Mapping[str, Kind] = {
    "train": TRAIN,
    "merge": MERGE,
    "probe": PROBE,
    "search": SEARCH,
    "prune": PRUNE,
    "prompt": PROMPT,
    "shrink": SHRINK,
    "evaluate": EVALUATE,
}
"""Name -> kind. To add a kind of stage, write its file and add an entry here."""
