"""`corefit compare`."""

from __future__ import annotations

from pathlib import Path

import click

from corefit.errors import plain


@click.command()
@click.argument("runs", metavar="RUN RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder to write [compare/NAME-NAME beside the folder of the runs].",
)
def compare(runs: tuple[Path, ...], out: Path | None) -> None:
    """Compare RUNs in one table, one picture and one page.

    RUN is the folder of a run, such as runs/NAME, or of one of its stages, such as runs/NAME/01-soar. All must have
    been evaluated on the same prompts and the same noise. Nothing is generated again.
    """
    from corefit.run.compare import compare as comparing
    from corefit.system.display import Display

    click.echo(plain(f"all of it is in {comparing(runs, out, Display.on())}"))
