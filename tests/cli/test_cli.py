"""The command line: quick, without torch where it needs none, and with a help text for everything."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from corefit.cli import commands as cli
from corefit.plugins import Host
from corefit.types import key_of

HEAVY = ("accelerate", "diffusers", "matplotlib", "peft", "streaming", "torch", "torchvision", "transformers")
"""Packages that only a run needs."""
IMPORTED = f"""
import sys
from corefit.cli import main
try:
    main()
except SystemExit as ended:
    print("status", ended.code or 0)
print("heavy", [name for name in {HEAVY!r} if name in sys.modules])
"""


def said_by(*args, cwd=None):
    """Return what a command prints, its exit status, and which heavy packages it imported."""
    done = subprocess.run([sys.executable, "-c", IMPORTED, *args], capture_output=True, text=True, cwd=cwd, timeout=200)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


def seconds(run):
    """Return processor time of child processes, which other work of the machine does not change."""
    before = os.times()
    run()
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["plugins"], 0),
        (["run", "--help"], 0),
        (["new", "reward", "mine"], 0),
        (["new", "pipeline", "mine"], 0),
        (["completion", "zsh"], 0),
        (["check", "none.toml"], 2),
        (["run", "none.toml"], 2),
        (["compare", "none", "other"], 2),
    ],
)
def test_imports_nothing_heavy(args, status, tmp_path):
    said = said_by(*args, cwd=tmp_path)
    assert f"status {status}" in said
    assert "heavy []" in said


def test_check_reads_no_weights(project):
    spoiled = project.own("base")
    for weights in spoiled.rglob("*.safetensors"):
        weights.write_bytes(b"")
    before = project.tree()
    assert project.main("check", "pipeline.toml").status == 0
    after = {name: stat for name, stat in project.tree().items() if not name.startswith(".corefit")}
    assert after == before, "check writes nothing but the estimate"


def test_check_says_what_a_run_would_do(project):
    ended = project.command("check", "pipeline.toml")
    assert (ended.status, ended.err) == (0, "")
    said, *stages = ended.out.splitlines()
    assert said == f"pipeline.toml: ok: soar (2 steps of 4), grpo (1 steps of 4); runs go to {project.folder}/runs/tiny"
    assert ["each", "process", "soar", "grpo"] in [line.split() for line in stages]


def test_a_dry_run_reads_no_weights_and_writes_nothing(project):
    for weights in project.own("base").rglob("*.safetensors"):
        weights.write_bytes(b"")
    before = project.tree()
    said = said_by("run", "--dry-run", "pipeline.toml", cwd=project.folder)
    assert said.splitlines() == [
        "data           8 examples to encode",
        "prompts        6 examples to encode",
        "evaluate base  on 4 held-out prompts: not evaluated yet",
        "01-soar        train 2 steps: not trained yet",
        "evaluate soar  on 4 held-out prompts: not evaluated yet",
        "02-grpo        train 1 step: not trained yet",
        "evaluate grpo  on 4 held-out prompts: not evaluated yet",
        "status 0",
        "heavy ['accelerate', 'torch']",
    ]
    assert project.tree() == before


def test_from_an_unknown_stage_writes_nothing(project):
    before = project.tree()
    for rest in ([], ["--dry-run"]):
        ended = project.main("run", "pipeline.toml", "--from", "grop", *rest)
        assert (ended.status, ended.out) == (2, "")
        assert ended.err.startswith("error: --from grop: there is no stage 'grop' (did you mean 'grpo'?); there are: ")
    assert project.tree() == before


def test_from_only_and_dry_run_reach_the_run(project, monkeypatch):
    asked = []
    for name in ("run", "dry_run"):
        monkeypatch.setattr(
            f"corefit.run.run.{name}", lambda pipeline, again, only, name=name: asked.append((name, again, only))
        )
    project.main("run", "pipeline.toml")
    project.main("run", "pipeline.toml", "--from", "grpo")
    project.main("run", "pipeline.toml", "--from", "soar", "--dry-run")
    project.main("run", "pipeline.toml", "--only", "soar", "--only", "grpo")
    assert asked == [("run", "", ()), ("run", "grpo", ()), ("dry_run", "soar", ()), ("run", "", ("soar", "grpo"))]


def test_help_in_under_half_a_second(project):
    assert min(seconds(lambda: project.command("--help")) for _ in range(3)) < 0.5


def test_help_names_every_command(project):
    for args in (("--help",), ("-h",)):
        ended = project.main(*args)
        assert ended.status == 0
        assert "Post-train flow-matching image and video models" in ended.out
        assert all(f"\n  {name} " in ended.out for name in cli.cli.commands)
        cut = [line for line in ended.out.partition("Commands:")[2].splitlines() if line.endswith("...")]
        assert cut == [], "a command's first sentence is too long for the list"
    first = {"run", "check", "prepare", "show", "plugins", "schema", "new", "completion"}
    assert set(cli.cli.commands) == first | {"compare", "eval", "export", "push", "sample", "serve-reward", "watch"}


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "run",
            [
                *("PIPELINE", "--set KEY=VALUE", "--out PATH", "--from STAGE", "--dry-run"),
                *("continues a run", "accelerate launch -m corefit run PIPELINE"),
            ],
        ),
        ("check", ["PIPELINE", "--set KEY=VALUE", "--out PATH", "whether it fits"]),
        (
            "new",
            [
                "KIND NAME",
                "objective, backbone, sampler, noise, reward, source, observer or",
                "--folder PATH",
                "corefit-NAME",
            ],
        ),
        ("completion", ["SHELL is bash, zsh or fish", "~/.bashrc"]),
        ("plugins", ["[FILES]...", "List all plugins with their keys and owners"]),
    ],
)
def test_help_of_every_command(project, command, said):
    ended = project.main(command, "--help")
    assert ended.status == 0
    assert f"Usage: corefit {command}" in ended.out or f"{command} [OPTIONS]" in ended.out
    assert [part for part in said if part not in ended.out] == []


def test_pipeline_toml_is_the_pipeline_if_none_is_named(project):
    named, here = (project.main("check", *args) for args in (["pipeline.toml"], []))
    assert (here.status, here.out) == (0, named.out)
    (project.folder / "pipeline.toml").rename(project.folder / "other.toml")
    for command in ("run", "check", "prepare", "show"):
        ended = project.main(command)
        assert (ended.status, ended.out) == (2, "")
        assert "Name a PIPELINE, for there is no pipeline.toml here. `corefit new pipeline NAME` writes" in ended.err
    assert project.main("check", "pipeline.toml").err == "error: there is no pipeline file pipeline.toml\n"


@pytest.mark.parametrize("command", [(), *((name,) for name in sorted(cli.cli.commands))], ids="".join)
def test_help_fits_into_80_columns(command, monkeypatch, capsys):
    """In a wider terminal, too, so that the pages of docs/ show what users see."""
    monkeypatch.setenv("COLUMNS", "200")
    cli.cli([*command, "--help"], prog_name="corefit", standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if len(line) > 80] == []
    assert max(map(len, lines)) > 60, "it takes the room that there is"


def test_version(project):
    assert project.main("--version").out == f"corefit, version {version('corefit')}\n"


def test_python_m_is_the_same_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "corefit", "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"corefit, version {version('corefit')}\n")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "Commands:"),
        (["trian"], "No such command 'trian'"),
        (["eval"], "Missing argument 'EVALUATION'"),
        (["run", "pipeline.toml", "--sett", "a=1"], "--sett"),
        (["check", "pipeline.toml", "--set"], "--set"),
    ],
)
def test_wrong_usage(project, args, said):
    ended = project.main(*args)
    assert (ended.status, ended.out) == (2, "")
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_out_is_relative_to_the_working_directory(project, monkeypatch):
    ended = project.main("check", "pipeline.toml", "--out", "else where")
    assert f"runs go to {project.folder}/else where/tiny\n" in ended.out
    ended = project.main("check", "pipeline.toml", "--out", "bright.py")
    assert ended.status == 2
    assert "out: " in ended.err
    assert "bright.py is a file" in ended.err


def test_set_reaches_the_pipeline(project):
    ended = project.main("check", "pipeline.toml", "--set", "stage.soar.steps=7", "--set", "stage.grpo.batch=8")
    assert "ok: soar (7 steps of 4), grpo (1 steps of 8)" in ended.out


def test_plugins_lists_every_offer_with_its_keys(project):
    ended = project.main("plugins")
    assert ended.status == 0
    for kind, offers in Host().offers.items():
        assert f"{kind.replace('_', ' ')}" in ended.out
        for name, offer in offers.items():
            assert f"\n  {name}  ({offer.owner})" in ended.out
            keys = [key_of(field.name) for field in offer.cls.__attrs_attrs__ if field.init]
            assert [key for key in keys if f"\n      {key}: " not in ended.out] == []


def test_plugins_lists_local_files(project):
    ended = project.main("plugins", "bright.py")
    assert "\n  bright  (bright.py)  Mean of all pixels times `gain`.\n      gain: float = 1.0\n" in ended.out
    ended = project.main("plugins", "dark.py")
    assert (ended.status, ended.out) == (2, "")
    assert "there is no file dark.py" in ended.err


def test_interrupted(project, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("corefit.pipeline.pipeline.read", interrupted)
    ended = project.main("run", "pipeline.toml")
    assert (ended.status, ended.err.strip()) == (130, "stopped; the same command continues")


def test_what_is_no_fault_of_the_user_keeps_its_traceback(project, monkeypatch):
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(sys, "argv", ["corefit", "check", "pipeline.toml"])
    monkeypatch.setattr("corefit.cli.checking.read", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_the_installed_command_is_this_one():
    assert Path(sys.executable).with_name("corefit").is_file()


@pytest.mark.parametrize(("command", "status"), [(["plugins"], 1), (["plugins", "absent.py"], 2), (["bogus"], 2)])
def test_a_reader_that_goes_ends_it_quietly(command, status):
    """A closed pipe (`corefit plugins 2>&1 | head -1`) causes no traceback, and does not change the exit status."""
    said, heard = os.pipe()
    os.close(said)
    process = subprocess.run([sys.executable, "-m", "corefit", *command], stdout=heard, stderr=heard)
    os.close(heard)
    assert process.returncode == status
