"""`corefit export` and `corefit push`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from corefit.errors import plain


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("stage")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--as",
    "what",
    type=click.Choice(["model", "lora"]),
    default="model",
    show_default=True,
    help="The whole model, into which a LoRA is merged; or a LoRA: the stage's, or with --rank the difference.",
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(["diffusers", "comfyui"]),
    default="diffusers",
    show_default=True,
    help="A folder for diffusers; or a file for ComfyUI, of the transformer alone.",
)
@click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="Cast the weights [as they are stored].")
@click.option(
    "--rank",
    type=click.IntRange(1),
    metavar="N",
    help="With --as lora: approximate the difference from the base by a LoRA of rank N.",
)
def export(
    run: Path,
    stage: str,
    out: Path,
    what: Literal["model", "lora"],
    layout: Literal["diffusers", "comfyui"],
    dtype: str | None,
    rank: int | None,
) -> None:
    """Write the model of a stage, for diffusers or ComfyUI.

    RUN is the folder of a run, such as runs/digits, and STAGE one of its stages. OUT is a new folder, or for ComfyUI a
    new file that ends in .safetensors; a model of two networks, such as Wan 2.2 A14B, is a folder with two files.
    """
    from corefit.run.publish.export import Export
    from corefit.run.publish.export import export as exporting
    from corefit.system.display import Display

    exporting(run, stage, out, Export(what=what, layout=layout, dtype=dtype, rank=rank), Display.on())


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("stage")
@click.argument("repo")
@click.option("--public", is_flag=True, help="Let everyone read a repository that is created [private].")
@click.option("--branch", metavar="NAME", help="Branch of the repository, new or not [main].")
def push(run: Path, stage: str, repo: str, public: bool, branch: str | None) -> None:
    """Upload the model of a stage to the Hugging Face hub.

    RUN is a folder such as runs/NAME, STAGE one of its stages, REPO is NAME or ORGANIZATION/NAME. What goes up is the
    stage's model/ (weights, model card, picture) and results.json. After a failure the same command goes on.
    """
    from corefit.run.publish.push import push as pushing

    where = pushing(run, stage, repo, public=public, branch=branch, say=lambda line: click.echo(plain(line)))
    click.echo(plain(f"{stage} is at {where}"))
