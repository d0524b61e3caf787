"""Runs a pipeline: trains its stages, evaluates them and reports the results."""
