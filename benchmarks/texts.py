"""How many bytes the encoded captions of a cache take, and how fast they are read, against captions stored as they are.

The text encoders are T5s with random weights, with the relative positions and the depth of the real one, and less wide;
a caption is made as wide as the real one's by several of them. How near positions of padding are to each other, which
decides the size, depends on the weights: see `--spread`.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import click
from attrs import frozen
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import timing
from corefit.data import mds, texts
from corefit.data.dataset import pack
from corefit.data.mds import TensorSpec

WIDTH = 4096
"""Of T5-XXL and UMT5-XXL."""
TOKENS = (15, 60, 200)
"""Short, usual and long captions."""
KINDS: Mapping[str, tuple[int, str]] = {
    "FLUX": (512, "none"),
    "FLUX, max_sequence_length = 256": (256, "none"),
    "SD3, T5's part": (256, "none"),
    "Chroma": (512, "mask"),
    "Wan": (512, "zeros"),
}
"""Positions, and what padding is: "none" is computed like text, "mask" is masked in T5, "zeros" is zeros."""
COLUMN, TARGET = "cond.prompt_embeds", 0.25
BATCH = 16
"""Captions that are read at once."""


@frozen
class Found:
    """What one caption takes.

    share          bytes of those of the tensor
    plain, coded   CPU seconds of reading it
    written        CPU seconds of writing it
    """

    kind: str
    tokens: int
    bytes: int
    share: float
    plain: float
    coded: float
    written: float


@click.command("texts")
@click.option("--layers", default=24, show_default=True, type=click.IntRange(1), help="Of the text encoder.")
@click.option("--narrow", default=512, show_default=True, type=click.IntRange(64), help="Its width.")
@click.option("--spread", default=1.0, show_default=True, help="Standard deviation of the relative positions' weights.")
@click.option("--captions", default=1, show_default=True, type=click.IntRange(1), help="For each length.")
@click.option("--json", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write the figures there too.")
def texts_(layers: int, narrow: int, spread: float, captions: int, file: Path | None) -> None:
    """Measure the encoded captions of each family: bytes, and seconds to read them (3 minutes)."""
    encode = _encoder(layers, narrow, spread)
    found = [_measured(kind, tokens, encode, captions) for kind in KINDS for tokens in TOKENS]
    table = Table(box=box.MARKDOWN)
    for heading in ("", "tokens", "bytes", "share", f"target {TARGET}", "read plain", "read coded", "write"):
        table.add_column(heading)
    for one in found:
        times = (f"{1000 * seconds:.1f} ms" for seconds in (one.plain, one.coded, one.written))
        verdict = "ok" if one.share <= TARGET else "MISSED"
        table.add_row(one.kind, str(one.tokens), f"{one.bytes / 1e6:.2f} MB", f"{one.share:.3f}", verdict, *times)
    Console(width=120).print(table)
    if file:
        rows = [attrs.asdict(one) for one in found]
        file.write_text(json.dumps({"benchmark": "texts", "machine": timing.machine(), "found": rows}, indent=1))


def _encoder(layers: int, narrow: int, spread: float) -> Callable[[int, int, str, int], Any]:
    """Return what gives (tokens, positions, padding, seed) -> a caption [1, positions, WIDTH] in bfloat16."""
    import torch
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=1000,
        d_model=narrow,
        d_kv=64,
        d_ff=narrow * 5 // 2,
        num_heads=narrow // 64,
        num_layers=layers,
        feed_forward_proj="gated-gelu",
    )
    model = T5EncoderModel(config).eval()
    bias: Any = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    with torch.no_grad():
        bias.weight.normal_(0, spread)
        model.encoder.final_layer_norm.weight.fill_(0.1)
    model.bfloat16()

    def encode(tokens: int, positions: int, padding: str, seed: int) -> Any:
        drawn = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 1000, (WIDTH // narrow, positions), generator=drawn)
        ids[:, tokens - 1], ids[:, tokens:] = 1, 0
        mask = torch.arange(positions)[None] < (positions if padding == "none" else tokens)
        with torch.no_grad():
            made = model(ids, attention_mask=mask.expand(len(ids), -1).long())[0]
        made = made * mask[..., None] if padding == "zeros" else made
        return made.permute(1, 2, 0).reshape(1, positions, WIDTH)

    return encode


def _measured(kind: str, tokens: int, encode: Callable[[int, int, str, int], Any], captions: int) -> Found:
    positions, padding = KINDS[kind]
    rows = [pack(encode(tokens, positions, padding, seed))[0] for seed in range(captions)]
    spec = TensorSpec("bfloat16", (positions, WIDTH))
    with tempfile.TemporaryDirectory() as made:
        folder, written = Path(made), time.process_time()
        with texts.open_writer(folder, {COLUMN: spec}) as writer:
            for number, row in enumerate(rows):
                writer.number(str(number), {COLUMN: row})
        written = time.process_time() - written
        with mds.open_writer(folder / "plain", {COLUMN: "bytes"}) as plainly:
            for row in rows:
                plainly.append({COLUMN: row})
        coded, plain = mds.Shards(folder / texts.FOLDER), mds.Shards(folder / "plain")
        size = coded.bytes / captions
        reads = _plain(plain, spec), _coded(coded, spec)
        seconds = [_seconds(read, captions) for read in reads]
        for number, row in enumerate(rows):
            assert pack(reads[1](number)) == BATCH * [row], "a caption came back changed"
    return Found(kind, tokens, int(size), size / len(rows[0]), *seconds, written / captions)


def _plain(shards: mds.Shards, spec: TensorSpec) -> Callable[[int], Any]:
    """What captions that are stored as they are were read with."""
    import torch

    def read(number: int) -> Any:
        raw = bytearray(b"".join([shards[number][COLUMN] for _ in range(BATCH)]))
        return torch.frombuffer(raw, dtype=torch.bfloat16).reshape(BATCH, *spec.shape)

    return read


def _coded(shards: mds.Shards, spec: TensorSpec) -> Callable[[int], Any]:
    return lambda number: texts.restore([shards[number][COLUMN] for _ in range(BATCH)], spec)


def _seconds(read: Callable[[int], Any], captions: int, rounds: int = 5) -> float:
    """Median CPU seconds of reading one caption of a batch."""
    times: list[float] = []
    for _ in range(rounds):
        began = time.process_time()
        for number in range(captions):
            read(number)
        times.append((time.process_time() - began) / captions / BATCH)
    return timing.Spread.of(times[1:]).median  # the first one checks the shards
