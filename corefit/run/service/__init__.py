"""`corefit serve-reward`: a reward behind HTTP, in a process and an environment of its own."""

from corefit.run.service.serve import Settings, serve

__all__ = ["Settings", "serve"]
