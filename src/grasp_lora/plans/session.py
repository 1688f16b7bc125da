"""What stays loaded between the stages of a plan: examples, backbone, encodings, input norms."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from grasp_lora.base.clock import Clock
from grasp_lora.config.run_config import RunConfig
from grasp_lora.models.content import base_content
from grasp_lora.stages.stage import Stage
from grasp_lora.workbench.context import Context, model_spec, open_context
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
    """

    def __init__(
        self,
        config: RunConfig,
        data: RunData,
        context: Context | None = None,
        clock: Clock | None = None,
        quiet: bool = False,
        training: bool = True,
    ):
        self.config, self.data = config, data
        self.clock = context.clock if context is not None else clock or Clock()
        self.base = base_content(model_spec(config))
        self.on_saved: Callable[[], Any] | None = None
        self.quiet = quiet
        self._context, self._training = context, training

    @property
    def context(self) -> Context:
        """Examples and backbone; the first access loads the backbone."""
        if self._context is None:
            self._context = open_context(
                self.config, self.quiet, self.data, self._training, self.clock
            )
        if self.on_saved is not None:
            self._context.on_saved = self.on_saved
        return self._context

    def context_of(self, stage: Stage) -> Context:
        """Return the context with the settings of a stage; encoded examples are shared."""
        return replace(self.context, config=stage.config)
