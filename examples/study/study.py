"""Run arms of the study over seeds, and compare them: `python study.py --help` says how.

    python study.py --start under --only soar --only sft_compute --seeds 2     # two arms, minutes
    python study.py                                                            # all of it, a night and more

It calls `corefit run` and `corefit compare` and does nothing else. The same command continues what was stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
STARTS = ("under", "saturated", "curated", "curated_lora")
OVER = "sft_compute"
"""The arm that the tables show gains over, where it is run."""


def corefit(*words: str) -> None:
    print("corefit", *words, flush=True)
    if status := subprocess.run([sys.executable, "-m", "corefit", *words], cwd=HERE, check=False).returncode:
        sys.exit(status)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run arms of the study over seeds, and compare them.")
    parser.add_argument("--start", action="append", choices=STARTS, help="a starting point; by default all")
    parser.add_argument("--only", action="append", default=[], metavar="ARM", help="an arm; by default all")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds [5]")
    arguments = parser.parse_args()
    starts = arguments.start or STARTS
    if set(starts) - {"under"}:
        corefit("run", "long_sft.toml")  # the base of the others; finished after the first time
    only = [word for arm in arguments.only for word in ("--only", arm)]
    for seed in range(arguments.seeds):
        for start in starts:
            corefit("run", f"{start}.toml", "--set", f"seed={seed}", "--set", f"name={start}-{seed}", *only)
    over = ["--over", OVER] if not only or OVER in only else []
    for start in starts:
        runs = [f"runs/{start}-{seed}" for seed in range(arguments.seeds)]
        corefit("compare", "--seeds", *runs, *over, "--out", f"compare/{start}")


if __name__ == "__main__":
    main()
