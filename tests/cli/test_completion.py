"""Completion, called as shells call it, is quick, without torch, and silent about errors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_cli import IMPORTED, seconds

from corefit.cli.completion import SHELLS

Ask = Callable[..., list[tuple[str, str]]]
TWO_STAGES = '[[stage]]\nname = "soar"\n[[stage]]\nname = "grpo"\n[[stage]]\nname = "soar-again"\n'
BASH = shutil.which("bash")


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Types `corefit ...` and presses tab after the last word; kind and text of each answer."""

    def ask(*words: str) -> list[tuple[str, str]]:
        typed = {"COMP_WORDS": " ".join(["corefit", *words]), "COMP_CWORD": str(len(words))}
        done = subprocess.run(
            [str(Path(sys.executable).with_name("corefit"))],
            cwd=tmp_path,
            env={**os.environ, **typed, "_COREFIT_COMPLETE": "bash_complete"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return [(kind, text) for kind, _, text in (line.partition(",") for line in done.stdout.split("\n") if line)]

    return ask


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pipelines, one of them a folder further down, among other files."""
    for name in ("pipeline.toml", "pyproject.toml", "train.jsonl", "examples/digits.toml", ".hidden/no.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(TWO_STAGES)
    return tmp_path


def plain(*texts: str) -> list[tuple[str, str]]:
    return [("plain", text) for text in texts]


def test_commands_and_kinds(ask: Ask):
    assert ask("pl") == plain("plugins")
    assert {"run", "check", "new", "completion"} <= {text for _, text in ask("")}
    assert ask("new", "s") == plain("sampler", "source")
    assert ask("new", "objective", "mine", "--r") == plain("--rollout")
    assert ask("new", "objective", "--p") == plain("--pairs")
    assert ask("completion", "") == plain(*SHELLS)


@pytest.mark.parametrize("command", ["run", "check", "prepare", "show"])
def test_pipeline_files(ask: Ask, folder: Path, command: str):
    assert ask(command, "") == plain("examples/digits.toml", "pipeline.toml")
    assert ask(command, "pi") == plain("pipeline.toml")
    assert (
        ask(command, "ex") == ask(command, "examples/") == ask(command, "examples/d") == plain("examples/digits.toml")
    )


def test_where_there_is_no_pipeline_the_shell_completes_files(ask: Ask, folder: Path):
    assert ask("check", "tr") == [("file", "tr")]
    assert ask("check", "none/a") == [("file", "none/a")]


def test_stages_of_the_pipeline_that_is_named(ask: Ask, folder: Path):
    assert ask("run", "pipeline.toml", "--from", "") == plain("soar", "grpo", "soar-again")
    assert ask("run", "pipeline.toml", "--from", "so") == plain("soar", "soar-again")
    assert ask("run", "--set", "seed=1", "pipeline.toml", "--dry-run", "--from", "g") == plain("grpo")


def test_stages_of_the_pipeline_that_is_here(ask: Ask, folder: Path):
    (folder / "other.toml").write_text('[[stage]]\nname = "sft"\n')
    assert ask("run", "--from", "") == plain("soar", "grpo", "soar-again")
    assert ask("run", "other.toml", "--from", "") == plain("sft")


@pytest.mark.parametrize(
    "content",
    [None, "[[stage", "stage = 3", 'stage = ["soar"]', "[[stage]]\nname = 3", b"\xff"],
    ids=["missing", "no TOML", "a number", "a text", "no name", "no UTF-8"],
)
def test_nothing_is_said_of_a_pipeline_that_cannot_be_read(ask: Ask, tmp_path: Path, content: str | bytes | None):
    if content is not None:
        (tmp_path / "pipeline.toml").write_bytes(content.encode() if isinstance(content, str) else content)
    assert ask("run", "pipeline.toml", "--from", "") == []
    assert ask("run", "--from", "") == []


def test_it_is_quick_and_imports_nothing_heavy(ask: Ask, folder: Path):
    words = {"_COREFIT_COMPLETE": "bash_complete", "COMP_WORDS": "corefit run pipeline.toml --from ", "COMP_CWORD": "4"}
    code = "import sys; sys.argv[0] = 'corefit'\n" + IMPORTED
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **words},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["plain,soar", "plain,grpo", "plain,soar-again", "status 0", "heavy []"]
    assert min(seconds(lambda: ask("run", "pipeline.toml", "--from", "")) for _ in range(3)) < 0.5


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_is_the_shells_own(shell: str):
    done = subprocess.run(
        [str(Path(sys.executable).with_name("corefit")), "completion", shell],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"_COREFIT_COMPLETE={shell}_complete" in done.stdout
    if shutil.which(shell):
        assert subprocess.run([shell, "-n"], input=done.stdout, text=True, timeout=60).returncode == 0


@pytest.mark.skipif(BASH is None, reason="no bash here")
def test_bash_completes_with_it(folder: Path):
    """The script sourced, and its function called as a tab calls it."""
    asked = """
eval "$(corefit completion bash)"
COMP_WORDS=(corefit run pipeline.toml --from g) COMP_CWORD=4
_corefit_completion corefit
echo "${COMPREPLY[@]}"
complete -p corefit
"""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        [str(BASH), "-c", asked],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["grpo", "complete -o nosort -F _corefit_completion corefit"]


def test_an_unknown_shell_is_refused():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("corefit")), "completion", "tcsh"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert "'tcsh' is not one of 'bash', 'zsh', 'fish'" in done.stderr
