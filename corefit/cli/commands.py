"""The command line. A user's mistake ends in a message and exit status 2, never in a traceback."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from corefit import __version__
from corefit.cli import completion, evaluating, publishing, sampling, serving
from corefit.errors import ConfigError, CorefitError, Stopped, plain

if TYPE_CHECKING:
    from collections.abc import Sequence

    from corefit.cli.starting import Wanted
    from corefit.pipeline.pipeline import Pipeline
    from corefit.plugins.host import Host

SET = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key, such as stage.soar.steps=100. May be given several times.",
)
TRACE = click.option("--trace", is_flag=True, help="Print each hook call: whose it is, and what it returns.")
OUT = click.option("--out", type=click.Path(path_type=Path), help="Folder of run folders [runs/ beside PIPELINE].")


def _found(ctx: click.Context, param: click.Parameter, pipeline: Path) -> Path:
    """Return the pipeline file; a usage error if none is named and there is none here."""
    if ctx.get_parameter_source("pipeline") is ParameterSource.DEFAULT and not pipeline.exists():
        raise click.UsageError(
            "Name a PIPELINE, for there is no pipeline.toml here. `corefit new pipeline NAME` writes one, and "
            "`corefit new example digits` copies an example.",
            ctx,
        )
    return pipeline


PIPELINE = click.argument(
    "pipeline",
    default="pipeline.toml",
    type=click.Path(path_type=Path),
    shell_complete=completion.pipelines,
    callback=_found,
)
NEW = ("objective", "backbone", "sampler", "noise", "reward", "source", "observer", "optimizer", "pipeline", "example")
"""Words of corefit.plugins.kinds.KINDS, which help texts and shells would else wait for; a pipeline; an example."""
LARGEST = 1e9
"""Sizes of memory must be smaller than this number, in any unit."""
UNITS = {"": 1 << 30, "gib": 1 << 30, "gb": 10**9, "mib": 1 << 20, "mb": 10**6}


def memory_size(text: str) -> float:
    """Return the bytes of "24GiB", "24GB" or "24", which means GiB."""
    found = re.fullmatch(r"(\d+\.?\d*) *([a-zA-Z]*)", text)
    unit = UNITS.get(found[2].lower()) if found else None
    if not found or unit is None or not 0 < float(found[1]) < LARGEST:
        raise click.BadParameter(f"{text!r} is not a size of memory; write 24GiB or 24GB")
    return float(found[1]) * unit


GPU = click.option(
    "--gpu",
    "--memory",
    "memory",
    type=memory_size,
    metavar="SIZE",
    help="Memory of a GPU, such as 24GiB [this machine's].",
)


def devices(text: str) -> tuple[int, float]:
    """Return the number of devices and the bytes of each, of "24GiB" or "8x80GiB"."""
    number, times, each = text.rpartition("x")
    if times and not (number.strip().isdecimal() and int(number) > 0):
        raise click.BadParameter(f"{text!r} is not a number of GPUs and their memory; write 8x80GiB")
    return int(number or 1), memory_size(each.strip())


FIT = click.option(
    "--fit",
    "planned",
    type=devices,
    metavar="SIZE",
    help="Find the cheapest keys with which it fits into GPUs such as 24GiB or 8x80GiB.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="corefit")
def cli() -> None:
    """Post-train flow-matching image and video models: SFT, SOAR, Flow-GRPO, or an objective of your own."""


@cli.command()
@PIPELINE
@SET
@OUT
@click.option(
    "--from",
    "again",
    default="",
    metavar="STAGE",
    help="Run STAGE and all stages that descend from it anew.",
    shell_complete=completion.stages,
)
@click.option(
    "--only",
    multiple=True,
    metavar="STAGE",
    help="Train STAGE and those it starts from, no others. May be given several times.",
    shell_complete=completion.stages,
)
@click.option("--dry-run", is_flag=True, help="Print what would be done and why, and do nothing.")
@TRACE
def run(
    pipeline: Path,
    settings: tuple[str, ...],
    out: Path | None,
    again: str,
    only: tuple[str, ...],
    dry_run: bool,
    trace: bool,
) -> None:
    """Train the stages of PIPELINE in order, and evaluate each.

    The same command continues a run that was stopped. PIPELINE is pipeline.toml if none is named.

    On several GPUs: accelerate launch -m corefit run PIPELINE
    """
    checked = _read(pipeline, _with_out(settings, out), trace)
    from corefit.run import run as running

    if dry_run:
        running.dry_run(checked, again=again, only=only)
        return
    where = running.run(checked, again=again, only=only)
    if os.environ.get("RANK", "0") == "0":
        click.echo(plain(f"all of it is in {where}"))


@cli.command()
@PIPELINE
@SET
@OUT
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(1), help="Processes that it will run on.")
@GPU
@FIT
@click.option(
    "--measure",
    is_flag=True,
    help="Measure what [backbone] frozen costs: reads weights, encodes data.",
)
def check(
    pipeline: Path,
    settings: tuple[str, ...],
    out: Path | None,
    ranks: int,
    memory: float | None,
    planned: tuple[int, float] | None,
    measure: bool,
) -> None:
    """Check PIPELINE, its data, and whether it fits into memory.

    No weights are read, unless --measure asks for the loss of weights in fewer bits: it reads the base twice, as it is
    and in the format of `frozen`, and calls each 16 times on the first examples. They are encoded first, as a run
    would.
    """
    if planned and (memory is not None or ranks > 1 or measure):
        raise click.UsageError("--fit names the GPUs and their number itself; leave out --gpu, --ranks and --measure")
    from corefit.cli import checking

    if planned:
        checking.fit(pipeline, _with_out(settings, out), *planned)
    else:
        checking.check(pipeline, _with_out(settings, out), ranks, memory, measure=measure)


@cli.command()
@PIPELINE
@SET
def prepare(pipeline: Path, settings: tuple[str, ...]) -> None:
    """Encode the data of PIPELINE now, and print a summary.

    `corefit run` does so, too.

    On several GPUs: accelerate launch -m corefit prepare PIPELINE
    """
    checked = _read(pipeline, settings)
    from corefit.run.prepare import prepare as preparing

    preparing(checked)


@cli.command()
@PIPELINE
@SET
@OUT
@click.option("--count", default=32, show_default=True, type=click.IntRange(1), help="Number of examples.")
@click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="PNG to write [data.png in the run's folder].",
)
def show(pipeline: Path, settings: tuple[str, ...], out: Path | None, count: int, file: Path | None) -> None:
    """Draw the first examples that PIPELINE trains on.

    Each has its prompt, size and crop below it.
    """
    from corefit.pipeline.pipeline import read

    checked = read(pipeline, _with_out(settings, out))
    from corefit.run.show import show as showing

    showing(checked, count, file)


@cli.command()
@click.argument("folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--port", default=0, type=click.IntRange(0, 65535), help="Port to serve on [any that is free].")
@click.option("--browser/--no-browser", default=True, help="Open a browser [yes].")
def watch(folder: Path, port: int, browser: bool) -> None:
    """Show the page of RUN and follow it while the run goes on.

    RUN is a folder such as runs/NAME; a run that has ended, or was killed, has a page, too. The page is served on this
    machine alone (127.0.0.1) until Ctrl-C, and nothing is written.
    """
    from corefit.run.watch import watch as watching

    def opened(address: str) -> None:
        click.echo(f"{address} shows {plain(str(folder))}; Ctrl-C ends this")
        if browser:
            import webbrowser

            webbrowser.open(address)

    watching(folder, port, opened)


@cli.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@TRACE
def plugins(files: tuple[Path, ...], trace: bool) -> None:
    """List all plugins with their keys and owners. FILES are local plugin files to include."""
    from corefit.plugins.listing import listing

    click.echo(plain(listing(_host(files, trace))))


@cli.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
def schema(files: tuple[Path, ...]) -> None:
    """Print the JSON Schema of pipeline files.

    It knows all installed plugins, and those in local FILES. After `corefit schema > pipeline.schema.json`, editors
    complete and check a pipeline file whose first line is "#:schema pipeline.schema.json".
    """
    import json

    from corefit.pipeline.schema import schema as described

    click.echo(json.dumps(described(_host(files)), indent=1))


@cli.command()
@click.argument("kind", type=click.Choice(NEW), metavar="KIND")
@click.argument("name")
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    help="Folder to write, new or empty [corefit-NAME; NAME for a pipeline or an example].",
)
@click.option("--rollout", is_flag=True, help="An objective that learns from scored samples of its own, in groups.")
@click.option("--pairs", is_flag=True, help="An objective that learns from pairs of a chosen and a rejected medium.")
@click.option(
    "--from-folder",
    metavar="PICTURES",
    type=click.Path(path_type=Path),
    help="A pipeline for this folder of pictures or clips: a LoRA, with every choice explained.",
)
@GPU
@click.option("--backbone", metavar="FAMILY", help="sd3, flux, chroma, wan, ... [sd3; wan for clips].")
@click.option("--model", metavar="PATH", help="Folder of the model, or its name on the hub [the family's own].")
@click.option("--trigger", metavar="WORD", help="Word that stands for what is learned, such as ohwx.")
@click.option("--objective", metavar="NAME", help="What is learned [sft].")
def new(kind: str, name: str, folder: Path | None, rollout: bool, pairs: bool, **wanted: Any) -> None:
    """Write a new plugin or pipeline, or copy an example.

    KIND is objective, backbone, sampler, noise, reward, source, observer or optimizer, for a plugin called NAME: a
    distribution that works as it is, with tests and CI.

    KIND is pipeline, for a commented pipeline file and the schema by which editors complete it; or example, for a copy
    of an example, where NAME is digits or plugin. Options from
    --from-folder on are for pipelines.
    """
    from corefit.cli.new import new as writing

    forms = [form for form, given in (("rollout", rollout), ("pairs", pairs)) if given]
    for line in writing(kind, name, folder, forms, _wanted(kind, wanted)):
        click.echo(plain(line))


def _wanted(kind: str, given: dict[str, Any]) -> Wanted | None:
    """Return what is asked for from a folder, None without one; ConfigError for options that nothing would read."""
    named = {name: value for name, value in given.items() if value is not None}
    pictures = named.pop("from_folder", None)
    if named and pictures is None:
        option = next(iter(named)).replace("memory", "gpu")
        raise ConfigError(f"--{option} goes with --from-folder: corefit new pipeline NAME --from-folder PICTURES")
    if pictures is None:
        return None
    if kind != "pipeline":
        raise ConfigError("--from-folder is for pipelines: corefit new pipeline NAME --from-folder PICTURES")
    from corefit.cli.starting import Wanted

    return Wanted(folder=pictures, **named)


@cli.command(name="completion")
@click.argument("shell", type=click.Choice(completion.SHELLS), metavar="SHELL")
def completing(shell: str) -> None:
    """Print the script by which a shell completes commands.

    SHELL is bash, zsh or fish. Pipeline files and stages are completed, too.

    \b
    ~/.bashrc:  eval "$(corefit completion bash)"
    ~/.zshrc:   eval "$(corefit completion zsh)"
    fish:       corefit completion fish > ~/.config/fish/completions/corefit.fish
    """
    click.echo(completion.script(cli, shell))


cli.add_command(evaluating.compare)
cli.add_command(sampling.sample)
cli.add_command(serving.serve_reward)
cli.add_command(publishing.push)
cli.add_command(evaluating.evaluate)
cli.add_command(publishing.export)


def _read(pipeline: Path, settings: Sequence[str], trace: bool = False) -> Pipeline:
    """Read and check the pipeline; if one process of a launch fails to, all of them do."""
    from corefit.pipeline.pipeline import read
    from corefit.system.ranks import all_or_none

    return all_or_none(lambda: read(pipeline, settings, _host((), trace)))


def _host(files: tuple[Path, ...], trace: bool = False) -> Host:
    from corefit.plugins.host import Host

    host = Host(trace=_print_trace if trace else None)
    for file in files:
        host.add_file(file)
    return host


def _print_trace(line: str) -> None:
    click.echo(plain(line))


def _with_out(settings: tuple[str, ...], out: Path | None) -> list[str]:
    return [*settings, *([f"out='''{out.absolute()}'''"] if out else [])]


def main() -> None:
    """Run the command line. Exit status: 0 done, 2 an error the user can correct, 1 a bug, 130 stopped."""
    status = _status()
    _note(status)
    if _is_distributed():  # a normal exit would wait for processes that are gone, and for work on the GPU
        for stream in filter(None, (sys.stdout, sys.stderr)):  # a closed stream is None
            with suppress(BrokenPipeError):
                stream.flush()
        os._exit(status)
    sys.exit(status)


def _note(status: int) -> None:
    """Write the exit status to a file in the folder COREFIT_STATUS, for scripts around a launcher that hides it."""
    if folder := os.environ.get("COREFIT_STATUS"):
        with suppress(OSError):  # the status itself still tells
            Path(folder, os.environ.get("RANK", "0")).write_text(f"{status}\n")


def _say(text: str) -> None:
    """Print a line to stderr; if its reader is gone, the exit status still tells how the command ended."""
    try:
        click.echo(plain(text), err=True)
    except BrokenPipeError:
        _mute()


def _mute() -> None:
    """Send further output to /dev/null: at exit Python would complain about a pipe without a reader."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)


def _status() -> int:
    try:
        status = _called()
    except click.ClickException as error:
        try:
            error.show()
        except BrokenPipeError:
            _mute()
    except (KeyboardInterrupt, click.Abort) as error:
        if _is_distributed():
            from corefit.system import signals

            signals.ignore()  # a launcher may pass on to all processes a signal that one has received
        _say("stopped; the same command continues")
        if isinstance(error, Stopped):
            _leave_group()
        return 130
    except CorefitError as error:
        _say(f"error: {error}")
    except PermissionError as error:
        _say(f"error: {error.filename}: permission denied; change its mode, or name another")
    except Exception:
        if not _is_distributed():
            raise
        traceback.print_exc()
        return 1
    else:
        _leave_group()
        return status or 0
    return 2


NOISY = ("bitsandbytes", "diffusers.quantizers", "torch.utils._pytree")
"""Loggers of libraries that complain on import of what else is installed, or is not, whether it is used or not."""


def _called() -> int | None:
    """Run the typed command; a plugin's exit, a missing package and a file system that refuses become CorefitError."""
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        return cli(standalone_mode=False)
    except (Exception, SystemExit):
        from corefit.system import files
        from corefit.types import blame

        with blame.no_exit(), blame.no_missing_package(), files.explain_write_errors(Path(".")):
            raise


def _is_distributed() -> bool:
    """Return whether this is (still) one of several processes."""
    return "torch.distributed" in sys.modules and sys.modules["torch.distributed"].is_initialized()


def _leave_group() -> None:
    """Leave the process group; otherwise torch's threads may abort a process while it exits."""
    if _is_distributed():
        sys.modules["torch.distributed"].destroy_process_group()
