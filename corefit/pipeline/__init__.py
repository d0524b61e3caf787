"""The pipeline file: its tables as classes, read from TOML and checked."""

from corefit.data.settings import Data
from corefit.pipeline.eval import Eval
from corefit.pipeline.pipeline import Pipeline, read
from corefit.types.stage import Full, Lora, Optimizer, Stage

__all__ = ["Data", "Eval", "Full", "Lora", "Optimizer", "Pipeline", "Stage", "read"]
