"""Rewards and other plugins, as careless authors write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.hostile.case import CHECK, RUN, Case, Project

FILE = "odd.py"
HEAD = """\
from attrs import field, frozen
from corefit import Example, Offers, Reward, hookimpl
"""
OFFER = """

@hookimpl
def corefit_rewards():
    return {"odd": Odd}
"""


def cases() -> list[Case]:
    """All of this file."""
    return [*_scores(), *_classes(), *_others()]


def _plugin(source: str, project: Project, judge: bool = False) -> None:
    """A file beside the pipeline; its reward is learned from, or judges."""
    project.write(FILE, source)
    project.replace('plugins = ["bright.py"]', f'plugins = ["bright.py", "{FILE}"]')
    if judge:
        project.replace(
            'prompts = "heldout.jsonl"\nreward = [{ use = "bright" }]',
            'prompts = "heldout.jsonl"\nreward = [{ use = "odd" }]',
        )
    elif "corefit_rewards" in source:
        project.replace('reward = [{ use = "bright" }]\nsampler', 'reward = [{ use = "odd" }]\nsampler')


def _of(source: str, judge: bool = False) -> Callable[[Project], None]:
    return lambda project: _plugin(source, project, judge)


def method(body: str) -> str:
    """A reward whose `score` has this body."""
    score = f"    def score(self, media, prompts, meta):\n        import torch\n        {body}\n"
    return f"{HEAD}\n\n@frozen\nclass Odd(Reward):\n{score}{OFFER}"


def _word(name: str) -> str:
    """What a message must say: whose fault it is, or what it looks like."""
    return "out of memory" if "MemoryError" in name else "odd"


def plugged(name: str, source: str, *says: str, typed: tuple[str, ...] = RUN, judge: bool = False, **rest: Any) -> Case:
    again = typed == RUN and rest.get("status", (2,)) == (2,)
    return Case(name=name, area="rewards", spoil=_of(source, judge), typed=typed, says=says, again=again, **rest)


RESULTS: tuple[tuple[str, str], ...] = (
    ("gives None", "return None"),
    ("gives text", 'return "high"'),
    ("gives a list of text", 'return ["high"] * len(prompts)'),
    ("gives one number", "return 0.5"),
    ("gives a mean", "return media.mean()"),
    ("gives one too few", "return media.flatten(1).mean(1)[:-1]"),
    ("gives a column", "return media.flatten(1).mean(1, keepdim=True)"),
    ("gives a number for each pixel", "return media"),
    ("gives complex numbers", "return media.flatten(1).mean(1).to(torch.complex64)"),
    ("gives NaN", "return media.flatten(1).mean(1) * float('nan')"),
    ("gives inf", "return media.flatten(1).mean(1) + float('inf')"),
    ("gives a mapping", 'return {"odd": media.flatten(1).mean(1)}'),
    ("gives a generator", "return (0.5 for _ in prompts)"),
    ("gives meta tensors", "return torch.empty(len(prompts), device='meta')"),
    ("gives a sparse tensor", "return media.flatten(1).mean(1).to_sparse()"),
    ("raises ValueError", "raise ValueError('my own fault')"),
    ("raises an empty error", "raise RuntimeError"),
    ("raises KeyError", "return {}['absent']"),
    ("raises an assertion", "assert False, 'never'"),
    ("raises StopIteration", "return next(iter(()))"),
    ("raises OSError", "return open('/nowhere/at/all')"),
    ("raises MemoryError", "raise MemoryError"),
    ("recurses", "return self.score(media, prompts, meta)"),
    ("ends the process", "import sys; sys.exit(0)"),
    ("ends the process with text", "raise SystemExit('bye')"),
    ("raises GeneratorExit", "raise GeneratorExit"),
    ("raises with an escape sequence", "raise ValueError('\\x1b[31mEVIL')"),
    ("raises with a surrogate", "raise ValueError('\\udc80')"),
)


def _raised(name: str) -> str:
    """The file whose author's exception it is."""
    return FILE if name.startswith(("raises", "recurses")) and "MemoryError" not in name else ""


def _scores() -> list[Case]:
    found = [plugged(f"reward {name}", method(body), _word(name), theirs=_raised(name)) for name, body in RESULTS]
    judged = ("gives None", "gives text", "gives complex numbers", "gives NaN", "raises ValueError", "ends the process")
    found += [
        plugged(f"judge {name}", method(body), _word(name), judge=True, theirs=_raised(name))
        for name, body in RESULTS
        if name in judged
    ]
    good = "return media.flatten(1).mean(1)"
    return [
        *found,
        plugged("reward gives truth values", method("return media.flatten(1).mean(1) > 2"), "odd", status=(0, 2)),
        plugged("reward prints", method(f"print('x' * 1000); {good}"), status=(0,)),
        plugged("reward changes media in place", method(f"media.zero_(); {good}"), "odd", status=(0, 2)),
        plugged("reward changes prompts in place", method(f"prompts.clear(); {good}"), "odd", status=(0, 2)),
        plugged("reward changes folder", method(f"import os; os.chdir('/'); {good}"), status=(0, 2)),
        plugged("reward seeds torch", method(f"torch.manual_seed(0); {good}"), status=(0,)),
        plugged("reward turns gradients off", method(f"torch.set_grad_enabled(False); {good}"), status=(0, 2)),
        plugged("reward sets float64", method(f"torch.set_default_dtype(torch.float64); {good}"), status=(0, 2)),
        plugged("reward interrupts", method("raise KeyboardInterrupt"), status=(130,)),
    ]


def reward_class(body: str, decorator: str = "@frozen", base: str = "(Reward)") -> str:
    return f"{HEAD}\n\n{decorator}\nclass Odd{base}:\n    {body}\n{OFFER}"


def _classes() -> list[Case]:
    """What `check` can see: before anything is trained."""
    score = "def score(self, media, prompts, meta):\n        return media.flatten(1).mean(1)"

    def seen(name: str, source: str, *says: str, **rest: Any) -> Case:
        return plugged(name, source, *says, typed=CHECK, **rest)

    return [
        seen("reward has no score", reward_class('"""Odd."""'), "score"),
        seen("structural reward has no score", reward_class('"""Odd."""', base=""), "score"),
        seen("score takes two", reward_class("def score(self, media):\n        return media"), "score"),
        seen(
            "score takes five",
            reward_class("def score(self, media, prompts, meta, more):\n        return media"),
            "score",
        ),
        seen(
            "score takes keywords alone",
            reward_class("def score(self, *, media, prompts, meta):\n        return media"),
            "score",
        ),
        seen("score is no method", reward_class("score = 3"), "score"),
        seen("score is a coroutine", reward_class(f"async {score}"), "score"),
        seen(
            "score is misspelled", reward_class("def scoer(self, media, prompts, meta):\n        return media"), "score"
        ),
        seen("reward is no attrs class", reward_class(score, decorator=""), "attrs"),
        seen("reward is a dataclass", "import dataclasses\n" + reward_class(score, "@dataclasses.dataclass"), "attrs"),
        seen("reward has a key called use", reward_class(f"use: str = 'x'\n    {score}"), status=(0, 2)),
        seen("reward has a key called weight", reward_class(f"weight: float = 1.0\n    {score}"), status=(0, 2)),
        seen("reward has a key without a default", reward_class(f"path: str\n    {score}"), "path"),
        seen(
            "reward has a key of an unknown type",
            reward_class(f"what: 'Nowhere' = 1\n    {score}"),
            "reward",
            status=(0, 2),
        ),
        seen("reward has a key of any object", reward_class(f"what: object = 1\n    {score}"), status=(0, 2)),
        seen(
            "reward's validator raises TypeError",
            reward_class(f"x: int = field(default=1, validator=lambda *a: a + 1)\n    {score}"),
            "reward",
        ),
        seen("reward's default raises", reward_class(f"x: int = field(factory=lambda: 1 / 0)\n    {score}"), "reward"),
        seen(
            "reward raises when made",
            reward_class(f"def __attrs_post_init__(self):\n        raise RuntimeError('mine')\n\n    {score}"),
            "reward",
        ),
        seen(
            "reward ends the process when made",
            reward_class(f"def __attrs_post_init__(self):\n        raise SystemExit(0)\n\n    {score}"),
            "odd",
        ),
    ]


def _kind(kind: str, body: str, replace: tuple[str, str], base: str) -> Callable[[Project], object]:
    imports = f"{HEAD}from corefit import NoiseWeighting, Sampler, Source, Supervised, Term\n"
    offer = f"@hookimpl\ndef corefit_{kind}():\n    return {{'odd': Odd}}\n"
    source = f"{imports}\n\n@frozen\nclass Odd({base}):\n    {body}\n\n\n{offer}"

    def spoil(project: Project) -> None:
        _plugin(source, project)
        project.replace(*replace)

    return spoil


def _others() -> list[Case]:
    """Objectives, sources, samplers and noise weightings."""
    sft, cps = (
        ('objective = { use = "sft" }', 'objective = { use = "odd" }'),
        ('{ use = "cps", noise = 0.7 }', '{ use = "odd" }'),
    )
    source = ('source = { use = "jsonl", path = "train.jsonl" }', 'source = { use = "odd" }')
    noise = ('objective = { use = "sft" }', 'objective = { use = "sft" }\nnoise = { use = "odd" }')

    def of(name: str, kind: str, body: str, replace: tuple[str, str], base: str, **rest: Any) -> Case:
        return Case(
            name=name,
            area="rewards",
            spoil=_kind(kind, body, replace, base),
            typed=RUN,
            **{"says": ("odd",), "again": True, **rest},
        )

    terms = "def terms(self, batch, ctx):\n        "
    examples = "def examples(self):\n        "
    sample = "def sample(self, n, shift, rng):\n        import torch\n        "
    weight = "\n\n    def weight(self, sigma):\n        return sigma * 0 + 1"
    return [
        of("objective yields nothing", "objectives", f"{terms}return iter(())", sft, "Supervised"),
        of("objective gives None", "objectives", f"{terms}return None", sft, "Supervised"),
        of("objective yields a number", "objectives", f"{terms}yield 1.0", sft, "Supervised"),
        of(
            "objective yields no gradient",
            "objectives",
            f"{terms}yield Term.of(batch.clean.flatten(1).mean(1))",
            sft,
            "Supervised",
        ),
        of(
            "objective raises",
            "objectives",
            f"{terms}raise ValueError('mine')\n        yield",
            sft,
            "Supervised",
            theirs=FILE,
        ),
        of("objective ends the process", "objectives", f"{terms}raise SystemExit(0)\n        yield", sft, "Supervised"),
        of("objective has no terms", "objectives", "pass", sft, "Supervised"),
        of(
            "objective counts zero",
            "objectives",
            f"{terms}x = batch.clean; s = x.flatten(1).mean(1) * 0 + 0.5\n        "
            "yield Term(ctx.backbone.velocity(x, s, batch.cond).sum(), 0)",
            sft,
            "Supervised",
            status=(0, 2),
        ),
        of("source has no examples", "sources", "pass", source, "Source"),
        of("source gives nothing", "sources", f"{examples}return iter(())", source, "Source"),
        of("source gives None", "sources", f"{examples}return None", source, "Source"),
        of("source gives text", "sources", f"{examples}yield 'a red square'", source, "Source"),
        of(
            "source raises",
            "sources",
            f"{examples}raise ValueError('mine')\n        yield",
            source,
            "Source",
            theirs=FILE,
        ),
        of("source ends the process", "sources", f"{examples}raise SystemExit(0)\n        yield", source, "Source"),
        of(
            "source gives text for media",
            "sources",
            f"{examples}yield Example('a', 'pictures/0.png')",
            source,
            "Source",
        ),
        of(
            "source gives floats for media",
            "sources",
            f"{examples}import numpy; yield Example('a', numpy.zeros((16, 16, 3)))",
            source,
            "Source",
            says=("media",),
        ),
        of(
            "source gives metadata that is no JSON",
            "sources",
            f"{examples}import numpy; yield Example('a', numpy.zeros((16, 16, 3), 'uint8'), {{'x': object()}})",
            source,
            "Source",
            says=("meta",),
        ),
        of(
            "source gives another number each time",
            "sources",
            f"{examples}import numpy, time; n = time.time_ns() // 1000 % 5 + 1\n        "
            "yield from [Example('a', numpy.zeros((16, 16, 3), 'uint8'))] * n",
            source,
            "Source",
            status=(0, 2),
            says=("source",),
        ),
        of(
            "sampler gives None",
            "samplers",
            "def step(self, x, v, sigma, sigma_next):\n        return None",
            cps,
            "Sampler",
        ),
        of(
            "sampler raises",
            "samplers",
            "def step(self, x, v, sigma, sigma_next):\n        raise ValueError('mine')",
            cps,
            "Sampler",
            theirs=FILE,
        ),
        of("sampler has no step", "samplers", "pass", cps, "Sampler"),
        of(
            "noise gives sigma above 1",
            "noise_weightings",
            f"{sample}return torch.full((n,), 7.0){weight}",
            noise,
            "NoiseWeighting",
            status=(0, 2),
        ),
        of(
            "noise gives NaN",
            "noise_weightings",
            f"{sample}return torch.full((n,), float('nan')){weight}",
            noise,
            "NoiseWeighting",
            says=("finite",),
        ),
        of(
            "noise gives too few",
            "noise_weightings",
            f"{sample}return torch.full((1,), 0.5){weight}",
            noise,
            "NoiseWeighting",
        ),
        of("noise gives None", "noise_weightings", f"{sample}return None{weight}", noise, "NoiseWeighting"),
        of("noise has no weight", "noise_weightings", f"{sample}return torch.full((n,), 0.5)", noise, "NoiseWeighting"),
    ]
