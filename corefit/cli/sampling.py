"""`corefit sample`."""

from __future__ import annotations

from pathlib import Path

import click

from corefit.cli import completion
from corefit.errors import ConfigError, counted, plain

MOST = 10_000


def media_size(ctx: click.Context, param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Return (height, width) of "768,512", of "512", which is square, or (frames, height, width) of "81,480,832"."""
    if text is None:
        return None
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if not 1 <= len(numbers) <= 3:
        raise click.BadParameter(f"{text!r} is no size; write HEIGHT,WIDTH, such as 768,512")
    return numbers * 2 if len(numbers) == 1 else numbers


@click.command()
@click.argument("model")
@click.argument("prompts", nargs=-1, metavar="[PROMPT]...")
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Prompts in a .txt, .jsonl, .csv or .json file.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Folder, new or empty, or a .png [samples/MODEL].")
@click.option("--base", is_flag=True, help="Sample the base, too, from the same noise, and draw both.")
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Seed of the noise.")
@click.option("--n", "each", default=1, type=click.IntRange(1, MOST), metavar="N", help="Pictures of each prompt [1].")
@click.option("--guidance", type=click.FloatRange(0, min_open=True), metavar="X", help="Scale of guidance; 1 for none.")
@click.option("--steps", type=click.IntRange(1, MOST), metavar="N", help="Sampling steps.")
@click.option("--size", callback=media_size, metavar="H,W", help="Height and width; frames first for clips.")
@click.option("--negative", metavar="PROMPT", help="What guidance leads away from.")
@click.option("--batch", type=click.IntRange(1, MOST), metavar="N", help="Pictures at once.")
@click.option(
    "--pipeline",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Pipeline that a folder or LoRA belongs to.",
    shell_complete=completion.pipelines,
)
@click.option("--backbone", metavar="NAME", help="Family of a folder whose model_index.json does not say it.")
@click.option("--on", metavar="MODEL", help="Folder or hub name of the model that a LoRA goes on.")
def sample(
    model: str,
    prompts: tuple[str, ...],
    file: Path | None,
    out: Path | None,
    base: bool,
    each: int,
    negative: str | None,
    pipeline: Path | None,
    backbone: str | None,
    on: str | None,
    size: tuple[int, ...] | None,
    **settings: float | None,
) -> int:
    """Make pictures or clips with MODEL for each PROMPT.

    MODEL is a stage of a run, such as runs/NAME/02-grpo, a folder in diffusers' layout, or a LoRA. The settings are
    those of the run, or of --pipeline, or else the family's usual ones; the options below replace them. The noise is
    that of evaluation.
    """
    from corefit.run.sampling.subject import Request, find

    if bool(prompts) == bool(file):
        raise ConfigError('name the prompts, as in corefit sample MODEL "a red bus", or a file of them with --prompts')
    if "" in (each_.strip() for each_ in prompts):
        raise ConfigError("a prompt is empty; write one, or leave it out")
    given = {key: value for key, value in settings.items() if value is not None}
    found = find(Request(model, file or prompts, pipeline, backbone, on, size, given))
    if not base:
        found = found.alone()
    elif found.base is None:
        raise ConfigError(f"--base: {model} is a base itself, or nothing says what its base is; leave --base out")
    from corefit.run.sampling.sample import Sampling

    sampling = Sampling(found, each, negative, out)
    try:
        where = sampling.execute()
    except KeyboardInterrupt:
        click.echo(plain(f"stopped; {counted(len(sampling.made), 'picture')} done"), err=True)
        return 130
    click.echo(plain(f"{'it is' if len(sampling.made) == 1 else 'all of it is in'} {where}"))
    return 0
