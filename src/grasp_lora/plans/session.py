"""What stays loaded between the stages of a plan: examples, backbone, encodings, input norms."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from grasp_lora.base.clock import Clock
from grasp_lora.config.run_config import RunConfig
from grasp_lora.models.content import base_content
from grasp_lora.stages.stage import Stage
from grasp_lora.workbench.context import Context, model_spec, open_context, template_given
from grasp_lora.workbench.rows import RunData


class Session:
    """Examples and backbone of one process; the backbone is loaded when a stage first needs it.

    Args:
        config: settings of the run; its model and data settings hold for all stages.
        data: the examples.
        context: examples and backbone, if they are open already.
        clock: measures the time; a given context brings its own clock.
        quiet: print nothing.
        training: False plans no memory for training.
        inputs: adapters beside those of `config` whose chat template is used.
    """

    def __init__(
        self,
        config: RunConfig,
        data: RunData,
        context: Context | None = None,
        clock: Clock | None = None,
        quiet: bool = False,
        training: bool = True,
        inputs: Sequence[Path] = (),
    ):
        self.config, self.data = config, data
        self.clock = context.clock if context is not None else clock or Clock()
        self.base = base_content(model_spec(config))
        self.template = _template(config, context, inputs)
        self.on_saved: Callable[[], Any] | None = None
        self.quiet = quiet
        self._context, self._training, self._inputs = context, training, inputs

    def of(self, stage: Stage) -> "Session":
        """Return the session with the examples and the base model of a stage."""
        del stage
        return self

    def configs(self) -> list[RunConfig]:
        """Return the settings that name all inputs of the plan."""
        return [self.config]

    @property
    def context(self) -> Context:
        """Examples and backbone; the first access loads the backbone."""
        if self._context is None:
            self._context = open_context(
                self.config, self.quiet, self.data, self._training, self.clock, self._inputs
            )
        if self.on_saved is not None:
            self._context.on_saved = self.on_saved
        return self._context

    def context_of(self, stage: Stage) -> Context:
        """Return the context with the settings of a stage; encoded examples are shared."""
        return replace(self.context, config=stage.config)


class Sessions(Session):
    """Sessions of stages with other examples, for a process that does none of them itself.

    Args:
        by_stage: stage -> its session; at least one.
        quiet: print nothing.
    """

    def __init__(self, by_stage: Mapping[str, Session], quiet: bool = False):
        first = next(iter(by_stage.values()))
        super().__init__(first.config, first.data, quiet=quiet)
        self._by_stage = by_stage

    def of(self, stage: Stage) -> Session:
        return self._by_stage[stage.name]

    def configs(self) -> list[RunConfig]:
        return [one.config for one in dict.fromkeys(self._by_stage.values())]


def _template(config: RunConfig, context: Context | None, inputs: Sequence[Path]) -> str | None:
    """Return the chat template that the prompts get in place of the base model's."""
    if context is not None:
        return context.backbone.given_template
    given = template_given(config, inputs)
    return None if given is None else given.text
