"""What leaves a run: its models, with what others need to load them."""
