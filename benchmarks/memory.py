"""Random pipelines of tiny networks under a limit of memory that is enforced: what `corefit check` says fits, fits.

Memory is that of live tensors, counted at every operation of this thread, and an operation that exceeds the limit
raises torch's own error. So the limit is exact, and the same on every machine. Networks are small, and sizes such that
activations matter.
"""

from __future__ import annotations

import gc
import json
import random
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from attrs import asdict, field, frozen
from rich.console import Console
from rich.table import Table

from corefit.pipeline import read
from corefit.system.display import Display
from corefit.system.memory import LiveBytes
from corefit.testing import tiny_flux, tiny_sd3, tiny_wan
from corefit.train.estimate import Device, estimates

NEAR = 0.05
"""How far an estimate may be from what is measured, as a share of it."""
SPARE = 1.05
"""The limit, as a multiple of the estimate: what fits into it by the estimate must not run out of memory."""
WORDS = ("a", "picture", "of", "sky", "sea", "red", "green", "blue")
COLORS = {"red": (220, 30, 30), "green": (30, 220, 30), "blue": (30, 30, 220)}
EXAMPLES = 8
BRIGHT = '''\
"""How bright a picture is."""

from attrs import frozen

from corefit import Offers, Reward, hookimpl


@frozen
class Bright(Reward):
    def score(self, media, prompts, meta):
        return media.flatten(1).mean(1)


@hookimpl
def corefit_rewards() -> Offers[Reward]:
    return {"bright": Bright}
'''


@frozen(kw_only=True)
class Case:
    """A random pipeline.

    size    pixels of a side; of a clip there are `frames`
    layers  blocks of the network, of so many `heads`, each `width` wide
    """

    number: int
    family: str
    objective: str
    train: str
    rows: int
    size: int
    frames: int
    layers: int
    heads: int
    width: int
    checkpointing: bool
    precision: str
    frozen: str
    offload: str
    ema: bool
    evaluated: bool

    @staticmethod
    def draw(number: int) -> Case:
        """Draw the case of this number: always the same one."""
        drawn = random.Random(f"memory {number}")
        family = ("sd3", "flux", "wan")[number % 3]
        train = drawn.choice(("full", "lora", "lora"))
        packed = train == "lora"
        offload = drawn.choice(("none", "none", "blocks")) if packed else "none"
        return Case(
            number=number,
            family=family,
            objective=drawn.choice(("soar", "flow_grpo", "sft")),
            train=train,
            rows=drawn.choice((1, 2, 4)),
            size=drawn.choice((48, 64)),
            frames=5 if family == "wan" else 1,
            layers=drawn.choice((2, 3, 5)),
            heads=drawn.choice((3, 4)),
            width=drawn.choice((24, 36)) if family == "wan" else drawn.choice((16, 32)),
            checkpointing=drawn.random() < 0.4,
            precision=drawn.choice(("fp32", "fp32", "bf16")),
            frozen=drawn.choice(("", "", "fp8", "int8")) if packed else "",
            offload=offload,
            ema=drawn.random() < 0.3,
            evaluated=drawn.random() < 0.5,
        )

    def write(self, folder: Path) -> Path:
        """Write the pipeline file, with its data and its model, and return its path."""
        makes: Mapping[str, Callable[..., Path]] = {"sd3": tiny_sd3, "flux": tiny_flux, "wan": tiny_wan}
        keys: dict[str, Any] = {"layers": self.layers, "heads": self.heads, "head_width": self.width}
        if self.family == "flux":
            keys["single_layers"] = self.layers
        makes[self.family](folder / "base", words=WORDS, **keys)
        self._write_media(folder)
        (folder / "bright.py").write_text(BRIGHT)
        file = folder / "pipeline.toml"
        file.write_text("\n".join(self._lines()) + "\n")
        return file

    def _write_media(self, folder: Path) -> None:
        """Write pictures, or clips as folders of frames, in one color each, and a line for each."""
        import numpy as np
        from PIL import Image

        rows: list[str] = []
        for number in range(EXAMPLES):
            name = list(COLORS)[number % len(COLORS)]
            picture = Image.fromarray(np.full((self.size, self.size, 3), COLORS[name], np.uint8))
            media = f"{number}" if self.frames > 1 else f"{number}.png"
            (folder / str(number)).mkdir()
            for frame in range(self.frames if self.frames > 1 else 0):
                picture.save(folder / media / f"{frame}.png")
            if self.frames == 1:
                picture.save(folder / media)
            rows.append(json.dumps({"media": media, "prompt": f"a picture of a {name} sky"}))
        (folder / "train.jsonl").write_text("\n".join(rows) + "\n")

    def _lines(self) -> Iterator[str]:
        train = "rank = 4" if self.train == "lora" else ""
        yield f'name = "case{self.number}"\nplugins = ["bright.py"]\nprecision = "{self.precision}"'
        yield f'[backbone]\nuse = "{self.family}"\npath = "base"\nmax_sequence_length = 16'
        yield f'train = {{ use = "{self.train}"{", " if train else ""}{train} }}'
        yield f"gradient_checkpointing = {str(self.checkpointing).lower()}"
        yield f'offload = "{self.offload}"'
        if self.frozen:
            yield f'frozen = "{self.frozen}"'
        size = [self.frames, self.size, self.size] if self.frames > 1 else [self.size, self.size]
        yield f'[data]\nsource = {{ use = "jsonl", path = "train.jsonl" }}\nsize = {size}\nencode_batch = 1'
        yield f'[[stage]]\nname = "one"\nsteps = 2\nbatch = 4\nmicro_batch = {self.rows}'
        yield {
            "soar": 'objective = { use = "soar", points = 2, chunk = 1 }',
            "sft": 'objective = { use = "sft" }',
            "flow_grpo": 'objective = { use = "flow_grpo", group = 2, steps = 3 }\n'
            'sampler = { use = "flow_sde" }\nreward = [{ use = "bright" }]',
        }[self.objective]
        if self.ema:
            yield "ema = 0.9"
        if self.evaluated:
            prompts = ["a red sky", "a blue sea", "a green sky", "a red sea"]
            yield f"[eval]\nprompts = {json.dumps(prompts)}\nsteps = 2\nbatch = {self.rows}"
            yield 'reward = [{ use = "bright" }]'


@frozen(kw_only=True)
class Outcome:
    """What came of a case.

    estimated  bytes that the estimate says
    measured   bytes of live tensors at most, and `while_` what the estimate says was done then
    died       the error that ended it, "" if none did
    """

    case: Case
    estimated: float
    largest: str
    measured: int
    died: str = ""
    seconds: float = field(default=0.0)

    @property
    def error(self) -> float:
        """How far the estimate is from what was measured, as a share of that."""
        return self.estimated / self.measured - 1

    @property
    def passed(self) -> bool:
        """Whether the estimate is near, and nothing died."""
        return not self.died and abs(self.error) <= NEAR


@contextmanager
def limited(most: float) -> Generator[LiveBytes]:
    """Within, an operation of this thread with which live tensors exceed `most` bytes raises torch.OutOfMemoryError.

    Tensors are counted once an operation takes or returns them, whoever has made them.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    held = LiveBytes()

    class Limit(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for t in tree_leaves((args, kwargs, result)):
                if isinstance(t, torch.Tensor) and t.device.type == "cpu":
                    held.count(t)
            if held.now > most:
                raise torch.OutOfMemoryError(f"tried to allocate beyond {most:.0f} bytes, in {func}")
            return result

    with Limit():
        yield held


def measure(case: Case, limit: float | None = None) -> Outcome:
    """Run a case under a limit, by default that of its estimate with SPARE, and say what it took."""
    from corefit.run import run as running

    with tempfile.TemporaryDirectory() as folder:
        pipeline = read(case.write(Path(folder)))
        found = estimates(pipeline, Device.here())[0]
        largest = max(found.phases, key=lambda phase: phase.total)
        most = SPARE * largest.total if limit is None else limit
        gc.collect()
        died = ""
        with limited(most) as held:
            try:
                running.run(pipeline, Display.on(False))
            except Exception as error:  # what ends a run is the result here
                died = f"{type(error).__name__}: {error}".splitlines()[0]
        return Outcome(case=case, estimated=largest.total, largest=largest.name, measured=held.peak, died=died)


def table(outcomes: list[Outcome]) -> Table:
    """Make a table with a row for each case."""
    made = Table(box=None, pad_edge=False)
    for name in ("case", "estimated", "measured", "error", "largest phase", ""):
        made.add_column(name, justify="left" if name in ("case", "largest phase", "") else "right")
    for each in outcomes:
        case = each.case
        keys = [case.family, case.objective, case.train, case.precision, f"{case.rows} rows"]
        keys += [
            key for key, on in (("recomputed", case.checkpointing), ("ema", case.ema), ("eval", case.evaluated)) if on
        ]
        keys += [key for key in (case.frozen, case.offload) if key not in ("", "none")]
        verdict = "ok" if each.passed else f"FAIL {each.died}"
        sizes = [f"{n / 2**20:.1f} MiB" for n in (each.estimated, each.measured)]
        made.add_row(f"{case.number} {' '.join(keys)}", *sizes, f"{each.error:+.1%}", each.largest, verdict)
    return made


@click.command()
@click.option("--cases", default=20, show_default=True, help="How many random pipelines.")
@click.option("--first", default=0, show_default=True, help="The number of the first of them.")
@click.option("--json", "file", type=click.Path(path_type=Path), help="Where to write the figures.")
def memory(cases: int, first: int, file: Path | None) -> None:
    """Run random pipelines of tiny networks under an enforced limit of memory, and compare with `corefit check`."""
    outcomes: list[Outcome] = []
    for number in range(first, first + cases):
        outcomes.append(measure(Case.draw(number)))
        print(f"{number}: {outcomes[-1].error:+.1%} {outcomes[-1].died}", file=sys.stderr, flush=True)
    Console(width=160).print(table(outcomes))
    if file:
        rows = [{**asdict(each), "error": each.error, "passed": each.passed} for each in outcomes]
        file.write_text(json.dumps(rows, indent=2) + "\n")
    if failed := sum(not each.passed for each in outcomes):
        raise SystemExit(f"FAIL: {failed} of {len(outcomes)}")
