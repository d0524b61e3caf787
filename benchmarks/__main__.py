"""`python -m benchmarks` lists the benchmarks; `python -m benchmarks NAME --help` says what one of them takes."""

from __future__ import annotations

import click

from benchmarks.checkpoints import checkpoints
from benchmarks.data import data
from benchmarks.hostile import hostile
from benchmarks.overhead import overhead
from benchmarks.scoring import scoring
from benchmarks.sharding import sharding
from benchmarks.soar_step import soar_step
from benchmarks.start import start
from benchmarks.texts import texts_


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """What corefit costs, measured on this machine. See benchmarks/README.md."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


main.add_command(soar_step)
main.add_command(checkpoints)
main.add_command(data)
main.add_command(scoring)
main.add_command(sharding)
main.add_command(hostile)
main.add_command(start)
main.add_command(texts_)
main.add_command(overhead)

if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
