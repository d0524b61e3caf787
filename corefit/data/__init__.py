"""Training data: raw examples are encoded once into a cache on disk, and batches are read from that cache."""
