"""List all metrics in one table."""

from collections.abc import Mapping
from types import MappingProxyType

from grasp_lora.metrics.answers import ANSWERS
from grasp_lora.metrics.bertscore import BERTSCORE
from grasp_lora.metrics.likelihood import LIKELIHOOD
from grasp_lora.metrics.overlap import OVERLAP
from grasp_lora.metrics.records import Family
from grasp_lora.metrics.rouge import ROUGE

FAMILIES: tuple[Family, ...] = (ANSWERS, *OVERLAP, ROUGE, BERTSCORE, LIKELIHOOD)
"""Families of metrics that are measured together, in the order of reports."""

METRICS: Mapping[str, Family] = MappingProxyType(
    {name: family for family in FAMILIES for name in family.names}
)
"""Name of a metric -> family that measures it."""
