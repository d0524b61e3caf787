"""Run arms of the study over seeds, and compare them: `python study.py --help` says how.

    python study.py --start under --only soar --only sft_compute --seeds 2     # two arms, minutes
    python study.py --jobs 4                                                   # all of it, four runs at once: a night

It calls `corefit run` and `corefit compare` and does nothing else. The same command continues what was stopped.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

HERE = Path(__file__).parent
RUNS = HERE / "runs"
STARTS = ("under", "saturated", "curated", "curated_lora", "words")
OVER = "sft_compute"
"""The arm that the tables show gains over, where it is run."""


def corefit(*words: str, log: Path | None = None) -> None:
    """Run one command of corefit, with one thread: sums of more threads end in other bits. Ends where it fails."""
    print("corefit", *words, *([f"> {log}"] if log else []), flush=True)
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("a") if log else nullcontext() as output:
        errors = subprocess.STDOUT if log else None
        command = [sys.executable, "-m", "corefit", *words]
        status = subprocess.run(
            command, cwd=HERE, env=environment, stdout=output, stderr=errors, check=False
        ).returncode
    if status:
        sys.exit(status)


def arms(start: str) -> set[str]:
    """Return the names of the stages of a starting point."""
    return {stage["name"] for stage in tomllib.loads((HERE / f"{start}.toml").read_text(encoding="utf-8"))["stage"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="Run arms of the study over seeds, and compare them.")
    parser.add_argument("--start", action="append", choices=STARTS, help="a starting point; by default all")
    parser.add_argument("--only", action="append", default=[], metavar="ARM", help="an arm; by default all there are")
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds [5]")
    parser.add_argument("--jobs", type=int, default=1, help="how many runs at once, each on one core [1]")
    arguments = parser.parse_args()
    starts = [start for start in arguments.start or STARTS if {*arguments.only} <= arms(start)]
    if not starts:
        parser.error(f"no starting point has {', '.join(arguments.only)}; its arms are the stages of START.toml")
    only = [word for arm in arguments.only for word in ("--only", arm)]
    runs = [(start, seed) for seed in range(arguments.seeds) for start in starts]

    def run(start: str, seed: int) -> None:
        name = f"{start}-{seed}"
        log = RUNS / "logs" / f"{name}.log" if arguments.jobs > 1 else None
        corefit("run", f"{start}.toml", "--set", f"seed={seed}", "--set", f"name={name}", *only, log=log)

    (RUNS / "logs").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for done in [pool.submit(run, *each) for each in runs]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    over = ["--over", OVER] if not only or OVER in only else []
    for start in starts:
        folders = [f"runs/{start}-{seed}" for seed in range(arguments.seeds)]
        corefit("compare", "--seeds", *folders, *over, "--out", f"compare/{start}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the commands have said what to do
        sys.exit(130)
