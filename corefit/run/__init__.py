"""A run: a pipeline taken through its stages, judged and reported."""
