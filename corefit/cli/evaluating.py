"""`corefit eval` and `corefit compare`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from corefit.cli import completion
from corefit.errors import plain


@click.command("eval")
@click.argument("evaluation", type=click.Path(path_type=Path), shell_complete=completion.pipelines)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key, such as benchmark.drawbench.limit=100. May be given several times.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of evaluations [evals/ beside EVALUATION].")
@click.option("--check", "only_check", is_flag=True, help="Only check the file, its prompts, models and rewards.")
def evaluate(evaluation: Path, settings: tuple[str, ...], out: Path | None, only_check: bool) -> None:
    """Evaluate models on held-out prompts, without training.

    The file EVALUATION says which. The same command continues an evaluation that was stopped.

    On several GPUs: accelerate launch -m corefit eval EVALUATION
    """
    from corefit.pipeline.evaluation import read_evaluation
    from corefit.system.ranks import all_or_none

    keys = [*settings, *([f"out='''{out.absolute()}'''"] if out else [])]
    checked = all_or_none(lambda: read_evaluation(evaluation, keys))
    if only_check:
        models, benchmarks = (", ".join(each.name for each in found) for found in (checked.model, checked.benchmark))
        click.echo(plain(f"{evaluation}: ok: {models} on {benchmarks}; results go to {checked.run_folder}"))
        return
    from corefit.run.evaluation.models import evaluate as evaluating

    where = evaluating(checked)
    if os.environ.get("RANK", "0") == "0":
        click.echo(plain(f"all of it is in {where}"))


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
    from corefit.run.evaluation.compare import compare as comparing
    from corefit.system.display import Display

    click.echo(plain(f"all of it is in {comparing(runs, out, Display.on())}"))
