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
@click.option("--seeds", is_flag=True, help="RUNs differ in their seed alone: show means over them.")
@click.option("--over", default="", metavar="STAGE", help="With --seeds, show gains over this stage, too.")
def compare(runs: tuple[Path, ...], out: Path | None, seeds: bool, over: str) -> None:
    """Compare RUNs in one table, one picture and one page.

    RUN is the folder of a run, such as runs/NAME, or of one of its stages, such as runs/NAME/01-soar. All must have
    been evaluated on the same prompts and the same noise. Nothing is generated again.

    With --seeds, stages of one name are one row: the mean over the seeds, with intervals over seeds and prompts. FOLDER
    then also has data.json.gz, from which the same command makes the same table without the runs: RUN may be such a
    FOLDER, too.
    """
    from corefit.run.evaluation.compare import compare as comparing
    from corefit.run.evaluation.seeds import compare_seeds
    from corefit.system.display import Display

    if over and not seeds:
        raise click.UsageError("--over goes with --seeds")
    display = Display.on()
    folder = compare_seeds(runs, over, out, display) if seeds else comparing(runs, out, display)
    click.echo(plain(f"all of it is in {folder}"))
