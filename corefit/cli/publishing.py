"""`corefit push`."""

from __future__ import annotations

from pathlib import Path

import click

from corefit.errors import plain


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("stage")
@click.argument("repo")
@click.option("--public", is_flag=True, help="Let everyone read a repository that is created [private].")
@click.option("--branch", metavar="NAME", help="Branch of the repository, new or not [main].")
def push(run: Path, stage: str, repo: str, public: bool, branch: str | None) -> None:
    """Upload the model of STAGE of RUN to REPO on the Hugging Face hub.

    RUN is a folder such as runs/NAME, REPO is NAME or ORGANIZATION/NAME. What goes up is the stage's model/ (weights,
    model card, picture) and results.json. After a failure the same command goes on.
    """
    from corefit.run.publish.push import push as pushing

    where = pushing(run, stage, repo, public=public, branch=branch, say=lambda line: click.echo(plain(line)))
    click.echo(plain(f"{stage} is at {where}"))
