"""What a user can get wrong. The command line prints the message alone and exits with status 2."""

from __future__ import annotations


class CorefitError(ValueError):
    """Something outside the code is wrong: the message names the key or file and says what to do."""


class PluginError(CorefitError):
    """A plugin that cannot be used: broken import, misspelt hook, clash, an offer of the wrong kind."""


class ConfigError(CorefitError):
    """A pipeline that cannot run."""


class DataError(CorefitError):
    """Media, prompts or caches that are missing, damaged or contradictory."""


class ModelError(CorefitError):
    """A checkpoint folder that is missing, incomplete or of another family."""


class TrainingError(CorefitError):
    """A stage that had to stop before weights were spoilt."""


class NonFinite(TrainingError):
    """A loss, gradient or reward that is not finite.

    An objective raises it from `experience`, on every rank alike (ask `ctx.gather` first): the trainer then
    stops, or skips the batch where the stage says on_nan = "skip".
    """


class RankError(CorefitError):
    """Another process of the run stopped, so this one does."""


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; the checkpoint of `step` is written."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped after step {step}")
        self.step = step
