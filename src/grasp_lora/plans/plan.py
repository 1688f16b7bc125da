"""A plan: stages in the order in which they are done. Each stage names its inputs.

Functions build plans (`grasp_lora.plans.run_plan`, `compare`, `ablate`, `single`), and one executor
does their stages (`grasp_lora.plans.executor`). Building a plan reads no weights and writes
nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from grasp_lora.plans.kinds import KINDS
from grasp_lora.stages.keys import used_settings
from grasp_lora.stages.stage import Cost, Sizes, Stage


@dataclass(frozen=True)
class Plan:
    """Stages, each after those that it needs.

    Attributes:
        stages: name -> stage.
    """

    stages: Mapping[str, Stage]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for name, stage in self.stages.items():
            missing = [need for need in stage.needs() if need not in seen]
            assert not missing, f"{name} needs {missing}, which are no earlier stages"
            assert stage.name == name, f"{stage.name} is listed as {name}"
            seen.add(name)

    def cost(self, sizes: Sizes) -> dict[str, Cost]:
        """Return stage -> its cost, an upper bound."""
        return {name: KINDS[one.kind].cost(one, sizes) for name, one in self.stages.items()}


class PlanBuilder:
    """Collects the stages of a plan; equal stages are listed once."""

    def __init__(self) -> None:
        self._stages: dict[str, Stage] = {}
        self._known: dict[object, str] = {}

    def add(self, stage: Stage) -> str:
        """Add a stage and return its name in the plan.

        Args:
            stage: the stage. If an earlier stage does the same work from the same inputs, the stage
                is not added, and the name of the earlier one is returned.
        """
        identity = _identity(stage)
        if identity in self._known:
            return self._known[identity]
        assert stage.name not in self._stages, f"two stages are called {stage.name}"
        self._stages[stage.name] = stage
        self._known[identity] = stage.name
        return stage.name

    def drop(self, name: str) -> None:
        """Take a stage out that no other stage needs, such as one that cannot be done."""
        del self._stages[name]
        self._known = {identity: one for identity, one in self._known.items() if one != name}

    def built(self, name: str) -> Stage:
        """Return a stage that was added."""
        return self._stages[name]

    def build(self) -> Plan:
        """Return the plan."""
        return Plan(dict(self._stages))


def part_of(plan: Plan, wanted: tuple[str, ...]) -> Plan:
    """Return a plan of the named stages and all stages that they need."""
    kept = set(wanted)
    for name in reversed(list(plan.stages)):
        if name in kept:
            kept |= set(plan.stages[name].needs())
    return replace(plan, stages={n: s for n, s in plan.stages.items() if n in kept})


def _identity(stage: Stage) -> tuple[str, str]:
    used = used_settings(stage, KINDS[stage.kind])
    inputs = {role: (isinstance(one, str), str(one)) for role, one in stage.inputs.items()}
    options = {k: v for k, v in stage.options.items() if v is not None and v is not False}
    return stage.kind, repr((sorted(used.items()), sorted(inputs.items()), sorted(options.items())))
