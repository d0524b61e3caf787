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
