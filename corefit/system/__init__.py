"""The machine: files, processes, memory, the terminal, signals."""
