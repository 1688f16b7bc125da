"""All kinds of stages: those of `stages.table`, and the one that does a plan of its own."""

from collections.abc import Mapping

from grasp_lora.plans.cell import CELL
from grasp_lora.stages import table
from grasp_lora.stages.stage import Kind

KINDS: Mapping[str, Kind] = {**table.KINDS, "cell": CELL}
"""Name -> kind."""
