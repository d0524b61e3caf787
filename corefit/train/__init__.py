"""Training: the one loop, the weights it moves, and the checkpoints it leaves."""
