"""`python -m benchmarks gpu`: everything that needs a GPU, on one card, in one table."""

from benchmarks.gpu.command import gpu

__all__ = ["gpu"]
