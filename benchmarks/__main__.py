"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME --help` says what one of them takes."""

from __future__ import annotations

import click

from benchmarks.checkpoints import checkpoints
from benchmarks.communication import communication
from benchmarks.data import data
from benchmarks.encode import encode
from benchmarks.evaluation import evaluation
from benchmarks.gpu import gpu
from benchmarks.grpo_step import grpo_step
from benchmarks.hostile import hostile
from benchmarks.memory import memory
from benchmarks.overhead import overhead
from benchmarks.rollout import rollout
from benchmarks.scale import scale
from benchmarks.scoring import scoring
from benchmarks.sharding import sharding
from benchmarks.soar_step import soar_step
from benchmarks.startup import startup
from benchmarks.texts import texts_
from benchmarks.trainer import trainer


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """What corefit costs, measured on this machine. See benchmarks/README.md."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


main.add_command(soar_step)
main.add_command(grpo_step)
main.add_command(trainer)
main.add_command(rollout)
main.add_command(evaluation)
main.add_command(encode)
main.add_command(scale)
main.add_command(checkpoints)
main.add_command(data)
main.add_command(scoring)
main.add_command(sharding)
main.add_command(communication)
main.add_command(hostile)
main.add_command(startup)
main.add_command(texts_)
main.add_command(overhead)
main.add_command(memory)
main.add_command(gpu)

if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
