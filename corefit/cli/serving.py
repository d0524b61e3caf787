"""`corefit serve-reward`."""

from __future__ import annotations

from pathlib import Path

import click

from corefit.errors import plain


@click.command("serve-reward")
@click.argument("name")
@click.option("--port", required=True, type=click.IntRange(0, 65535), help="Port to listen on; 0 for any free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need a token.")
@click.option(
    "--set",
    "keys",
    multiple=True,
    metavar="KEY=VALUE",
    help="Set a key of the reward, such as gain=2. May be given several times.",
)
@click.option(
    "--plugin",
    "files",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A local plugin file to load. May be given several times.",
)
@click.option(
    "--token-env",
    default="",
    metavar="VAR",
    help="Environment variable with the token that clients must send.",
)
@click.option("--max-mib", default=64, show_default=True, type=click.IntRange(1, 4096), help="Largest request, in MiB.")
@click.option(
    "--max-samples", default=256, show_default=True, type=click.IntRange(1), help="Most samples in a request."
)
@click.option(
    "--batch",
    default=0,
    type=click.IntRange(0),
    metavar="N",
    help="Score waiting requests together, up to N samples in a call [each request by itself].",
)
def serve_reward(
    name: str,
    port: int,
    host: str,
    keys: tuple[str, ...],
    files: tuple[Path, ...],
    token_env: str,
    max_mib: int,
    max_samples: int,
    batch: int,
) -> None:
    """Serve the reward NAME over HTTP.

    A pipeline asks it with `reward = [{ use = "remote", url = "http://127.0.0.1:PORT" }]`. It runs in a process and an
    environment of its own, and stops at Ctrl-C or SIGTERM after the requests in progress.
    """
    from corefit.run.service import Settings, serve

    settings = Settings(host=host, port=port, token_env=token_env, max_mib=max_mib, samples=max_samples, batch=batch)
    serve(name, keys, files, settings, lambda line: click.echo(plain(line)))
