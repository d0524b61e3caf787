"""Plugin files: what importing them, asking them and telling them does."""

from __future__ import annotations

from typing import Any

from benchmarks.hostile.case import CHECK, Case, Project
from benchmarks.hostile.rewards import FILE, HEAD, method, plugged, reward_class


def cases() -> list[Case]:
    """All of this file."""
    return [*_modules(), *_observers()]


def _modules() -> list[Case]:
    """The file itself: what importing it does."""
    hook = "\n\n@hookimpl\ndef corefit_rewards():\n    "

    def listed(name: str, source: str | bytes, *says: str, **rest: Any) -> Case:
        def spoil(project: Project) -> None:
            project.write(FILE, source)

        return Case(name=name, area="rewards", spoil=spoil, typed=("plugins", FILE), says=says, **rest)

    return [
        listed("file has a syntax error", "def (:\n", FILE),
        listed("file has a tab error", "if True:\n\tx = 1\n        y = 2\n", FILE),
        listed("file is not UTF-8", b"x = '\xff'\n", FILE),
        listed("file has NUL", b"x = 1\0\n", FILE),
        listed("file is empty", "", status=(0, 2)),
        listed("file imports what is absent", "import nowhere_at_all\n", "nowhere_at_all"),
        listed("file ends the process", "import sys\nsys.exit(0)\n", FILE),
        listed("file ends the process with 3", "raise SystemExit(3)\n", FILE),
        listed("file interrupts", "raise KeyboardInterrupt\n", status=(2, 130)),
        listed("file recurses", "def f():\n    f()\nf()\n", FILE),
        listed("file is 20000 deep", f"x = {'(' * 20000}{')' * 20000}\n", FILE),
        listed("file raises a BaseException", "raise BaseException('mine')\n", FILE),
        listed(
            "file raises with an escape sequence", "raise ValueError('\\x1b[31mEVIL')\n", FILE, unsaid=("\x1b[31mEVIL",)
        ),
        listed(
            "file shadows corefit's name",
            HEAD.replace("hookimpl", "hookimpl as h") + "\n@h\ndef corefit_rewards():\n    return {'sharp': 1}\n",
            FILE,
        ),
        listed("file of another API", f"COREFIT_API = '99.0'\n{HEAD}", FILE),
        listed("file of an API that is no text", f"COREFIT_API = 99\n{HEAD}", FILE, status=(0, 2)),
        listed("hook is misspelled", f"{HEAD}\n@hookimpl\ndef corefit_reward():\n    return {{}}\n", "corefit_rewards"),
        listed("hook is not marked", f"{HEAD}\ndef corefit_rewards():\n    return {{}}\n", "hookimpl"),
        listed(
            "hook wants arguments",
            f"{HEAD}\n@hookimpl\ndef corefit_rewards(more):\n    return {{}}\n",
            "corefit_rewards",
        ),
        listed("hook gives None", f"{HEAD}{hook}return None\n", "corefit_rewards"),
        listed("hook gives a list", f"{HEAD}{hook}return []\n", "corefit_rewards"),
        listed("hook gives an instance", f"{HEAD}{hook}return {{'odd': 3}}\n", "odd"),
        listed("hook gives a number for a name", f"{HEAD}{hook}return {{3: Reward}}\n", "3"),
        listed(
            "hook gives an empty name",
            f"{HEAD}{reward_class('x: int = 1').replace(HEAD, '').replace('odd', '')}",
            FILE,
            status=(0, 2),
        ),
        listed(
            "hook gives a name with an escape sequence",
            f"{HEAD}{reward_class('x: int = 1').replace(HEAD, '').replace('odd', chr(92) + 'x1b[31mEVIL')}",
            unsaid=("\x1b[31mEVIL",),
            status=(0, 2),
        ),
        listed("hook raises", f"{HEAD}{hook}return 1 / 0\n", "corefit_rewards"),
        listed("hook ends the process", f"{HEAD}{hook}raise SystemExit(0)\n", FILE),
        listed("hook is a generator", f"{HEAD}{hook}yield {{}}\n", "corefit_rewards"),
        plugged(
            "two files offer one name",
            method("return media.flatten(1).mean(1)").replace('"odd"', '"bright"'),
            "bright",
            typed=("plugins", "bright.py", FILE),
        ),
        plugged(
            "an objective called sft",
            f"{HEAD}from corefit import Supervised\n\n\n@frozen\nclass Mine(Supervised):\n    "
            "def terms(self, batch, ctx):\n        yield 1\n\n\n"
            "@hookimpl\ndef corefit_objectives():\n    return {'sft': Mine}\n",
            "sft",
            typed=CHECK,
        ),
    ]


def _observers() -> list[Case]:
    def of(
        name: str, body: str, *says: str, hook: str = "corefit_step_finished(stage, state, metrics)", **rest: Any
    ) -> Case:
        return plugged(name, f"{HEAD}\n\n@hookimpl\ndef {hook}:\n    {body}\n", *says, **rest)

    adds = "corefit_step_metrics(stage, state, metrics)"
    return [
        of("observer raises", "raise ValueError('mine')", FILE.removesuffix(".py"), theirs=FILE),
        of("observer ends the process", "raise SystemExit(0)", FILE.removesuffix(".py")),
        of("observer changes metrics", "metrics.clear()", status=(0, 2)),
        of("observer wants more", "pass", "corefit_step_finished", hook="corefit_step_finished(stage, more)"),
        of(
            "observer of the end raises",
            "raise ValueError('mine')",
            FILE.removesuffix(".py"),
            theirs=FILE,
            hook="corefit_stage_finished(stage, state)",
        ),
        of(
            "observer deletes the checkpoint",
            "import shutil; shutil.rmtree(path)",
            hook="corefit_checkpoint_saved(stage, state, path)",
            status=(0, 2),
        ),
        of("observer adds a metric called step", "return {'step': 1.0}", "step", hook=adds),
        of("observer adds a metric called loss", "return {'loss': 1.0}", "loss", hook=adds),
        of("observer adds text", "return {'mine': 'x'}", FILE.removesuffix(".py"), hook=adds),
        of("observer adds NaN", "return {'mine': float('nan')}", "mine", hook=adds, status=(0, 2)),
        of(
            "observer adds a tensor",
            "import torch; return {'mine': torch.ones(3)}",
            FILE.removesuffix(".py"),
            hook=adds,
        ),
        of("observer adds a number for a name", "return {3: 1.0}", FILE.removesuffix(".py"), hook=adds),
        of("observer adds 10**400", "return {'mine': 10**400}", FILE.removesuffix(".py"), hook=adds),
        of("observer adds nothing", "return None", hook=adds, status=(0, 2)),
        of(
            "observer adds an escape sequence",
            "return {'\\x1b[31mEVIL': 1.0}",
            hook=adds,
            status=(0, 2),
            unsaid=("\x1b[31mEVIL",),
        ),
    ]
