"""Small checkpoints with random weights, in the layout of the real ones, for tests and examples.

Equal arguments write equal bytes, in any process. The vocabularies are made by hand, because tokenizer trainers break
ties differently from run to run.
"""

from corefit.testing.checkpoints.chroma import tiny_chroma
from corefit.testing.checkpoints.flux import tiny_flux
from corefit.testing.checkpoints.sd3 import tiny_sd3
from corefit.testing.checkpoints.text import clip_pieces, t5_pieces
from corefit.testing.checkpoints.wan import tiny_wan

__all__ = ["clip_pieces", "t5_pieces", "tiny_chroma", "tiny_flux", "tiny_sd3", "tiny_wan"]
