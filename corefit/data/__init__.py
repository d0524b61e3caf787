"""Data: from raw examples to encoded ones on the disk, and from those to batches."""
