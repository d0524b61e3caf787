"""What corefit costs, measured: `python -m benchmarks`."""
