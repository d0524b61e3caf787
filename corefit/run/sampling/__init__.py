"""`corefit sample`: pictures, or clips, for prompts that a user types."""
