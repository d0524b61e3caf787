"""Evaluation: weights are scored on held-out prompts, and what is known of them is kept and compared."""
