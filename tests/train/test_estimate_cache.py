"""Estimates that are kept: found without torch, and never after anything that determines them has changed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from attrs import evolve
from conftest import Project

from corefit.errors import ConfigError
from corefit.pipeline import Pipeline, read
from corefit.system import files
from corefit.train import estimate, estimate_cache
from corefit.train.estimate import Device, Estimate
from corefit.train.estimate_cache import Kept
from corefit.types import blame

HERE = Device("this one", 1e12, gpu=False)
MADE = [
    Estimate(
        stage="soar",
        parameters=7,
        trainable=3,
        weights=28.0,
        gradients=12.0,
        optimizer=24.0,
        exchanged=0.0,
        copies=0.0,
        gathered=0.0,
        activations=None,
    )
]


def older(path: Path, seconds: float = 60) -> None:
    """Let a file be as old as what was not edited just now."""
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


@pytest.fixture(autouse=True)
def no_files_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Local plugins that this process has imported for others, and that were written just now."""
    for name in [name for name in sys.modules if name.startswith(blame.LOCAL)]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def kept(project: Project) -> Kept:
    """Of the project's pipeline, with an estimate in its file."""
    older(project.folder / "bright.py")
    kept = Kept.of(read(project.file), HERE)
    assert kept.read() is None
    kept.write(MADE)
    assert kept.read() == MADE
    return kept


def again(project: Project, *settings: str) -> list[Estimate] | None:
    return Kept.of(read(project.file, settings), HERE).read()


def test_it_is_found_while_nothing_changes(project: Project, kept: Kept) -> None:
    assert kept.file is not None
    assert kept.file.parent == project.folder / ".corefit" / "estimates"
    assert again(project) == MADE
    weights = project.own("base") / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"other weights")
    older(project.own("train.jsonl"), 3600)
    assert again(project) == MADE, "neither weights nor data determine it"


KEYS = {
    "key of the backbone": "backbone.gradient_checkpointing=true",
    "train": "backbone.train={use='full'}",
    "precision": "precision='bf16'",
    "shard": "shard=true",
    "size": "data.size=[32,32]",
    "aspects": "data.aspects=['1:1']",
    "batch": "stage.soar.batch=8",
    "micro_batch": "stage.soar.micro_batch=1",
    "objective": "stage.soar.objective.chunk=2",
    "ema": "stage.grpo.ema=0.9",
    "save_dtype": "stage.soar.train={use='full'}",
}


@pytest.mark.parametrize("setting", KEYS.values(), ids=KEYS)
def test_another_pipeline_has_none(project: Project, kept: Kept, setting: str) -> None:
    try:
        assert again(project, setting) is None
    except ConfigError:  # full training before a LoRA
        assert again(project, "stage.grpo.train={use='lora',rank=2}", setting) is None


def test_another_stage_has_none(project: Project, kept: Kept) -> None:
    project.write(project.text.replace('name = "grpo"', 'name = "later"'))
    assert again(project) is None


def edited(project: Project, part: str, name: str, **values: Any) -> None:
    folder = project.own("base") if (project.folder / "base").is_symlink() else project.folder / "base"
    file = folder / part / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


CONFIGS: Mapping[str, tuple[str, str, Mapping[str, Any]]] = {
    "network": ("transformer", "config.json", {"num_layers": 3}),
    "vae": ("vae", "config.json", {"sample_size": 8}),
    "tokenizer": ("tokenizer", "tokenizer_config.json", {"model_max_length": 15}),
    "scheduler": ("scheduler", "scheduler_config.json", {"shift": 2.0}),
    "index": ("", "model_index.json", {"feature_extractor": [None, None]}),
}


@pytest.mark.parametrize(("part", "name", "values"), CONFIGS.values(), ids=CONFIGS)
def test_another_config_has_none(project: Project, kept: Kept, part: str, name: str, values: Mapping[str, Any]) -> None:
    edited(project, part, name, **values)
    assert again(project) is None


def test_another_path_to_the_same_model_has_its_own(project: Project, kept: Kept) -> None:
    (project.folder / "moved").symlink_to((project.folder / "base").resolve())
    assert again(project, "backbone.path='moved'") is None


@pytest.mark.parametrize(
    "other",
    [
        evolve(HERE, name="another"),
        evolve(HERE, memory=1e11),
        evolve(HERE, gpu=True),
        evolve(HERE, planned=True),
    ],
    ids=["name", "memory", "gpu", "planned"],
)
def test_another_device_has_none(project: Project, kept: Kept, other: Device) -> None:
    assert Kept.of(read(project.file), other).read() is None


def test_a_device_that_learned_bfloat16_has_none(project: Project, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    learned = not HERE.half("auto")
    monkeypatch.setattr("corefit.train.estimate.device.is_half", lambda precision: learned)
    assert again(project) is None


def test_processes_and_graphs_count(project: Project, kept: Kept) -> None:
    pipeline = read(project.file)
    assert Kept.of(pipeline, HERE, 2).read() is None
    assert Kept.of(pipeline, HERE, graphs=False).read() is None


@pytest.mark.parametrize("library", ["torch", "diffusers", "transformers", "peft", "accelerate", "flash_attn"])
def test_another_version_of_a_library_has_none(
    project: Project, kept: Kept, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path / "site")
    versions = [tmp_path / "site" / f"{library}-{number}.dist-info" for number in (1, 2)]
    versions[0].mkdir(parents=True)
    one = Kept.of(read(project.file), HERE)
    versions[0].rename(versions[1])
    two = Kept.of(read(project.file), HERE)
    older(versions[1])
    three = Kept.of(read(project.file), HERE)
    versions[1].rmdir()
    none = Kept.of(read(project.file), HERE)
    assert len({each.file for each in (kept, one, two, three, none)}) == 5, "installed anew, it is another too"


def test_another_python_has_none(project: Project, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version", f"{sys.version} of tomorrow")
    assert again(project) is None


def test_what_libraries_are_told_by_the_environment_counts(
    project: Project, kept: Kept, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "flash")
    assert again(project) is None


def test_another_class_of_the_same_name_has_none(project: Project, kept: Kept) -> None:
    pipeline = read(project.file)
    offers = pipeline.host.offers["backbones"]
    offers["sd3"] = evolve(offers["sd3"], owner="another distribution 2.0")
    assert Kept.of(pipeline, HERE).read() is None


# code


def source_of(monkeypatch: pytest.MonkeyPatch, package: str, source: str) -> None:
    plain: Callable[[str], str] = estimate_cache._source
    monkeypatch.setattr(estimate_cache, "_source", lambda name: source if name == package else plain(name))


@pytest.mark.parametrize("package", ["corefit", "corefit_backbones", "corefit_soar", "corefit_flow_grpo"])
def test_other_code_has_none(project: Project, kept: Kept, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of corefit with its estimate.py and fake.py, of the backbones, of objectives."""
    assert again(project) == MADE
    source_of(monkeypatch, package, "edited")
    assert again(project) is None


def test_the_source_of_a_package_is_all_of_it() -> None:
    folder = Path(estimate.__file__).parent.parent.parent
    of_package = files.sources(folder / "__init__.py")
    assert {folder / "train" / "estimate" / "stages.py", folder / "train" / "fake.py"} <= {*of_package}
    assert estimate_cache._source("corefit") == files.source(folder / "__init__.py")


def test_an_edited_local_plugin_has_none(project: Project, kept: Kept) -> None:
    plugin = project.folder / "bright.py"
    plugin.write_text(plugin.read_text() + "# edited\n")
    older(plugin)
    assert again(project) is None


def test_a_library_from_a_checkout_is_known_by_its_source(
    project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of `pip install -e`, whose version stays while its code changes; one that is gone has another source, too."""
    package = tmp_path / "checkout" / "corefit_of_a_test"
    package.mkdir(parents=True)
    for name in ("__init__.py", "shapes.py"):
        (package / name).write_text("")
        older(package / name)
    monkeypatch.syspath_prepend(package.parent)
    plugin = project.folder / "bright.py"
    plugin.write_text(f"import {package.name}\n" + plugin.read_text().replace("from __future__", "# from __future__"))
    older(plugin)
    kept = Kept.of(read(project.file), HERE)
    kept.write(MADE)
    assert again(project) == MADE
    (package / "shapes.py").write_text("SIZE = 2\n")
    assert again(project) is None
    (package / "shapes.py").write_text("")
    assert again(project) == MADE
    package.rename(package.with_name("gone"))
    assert kept.read() is None
    monkeypatch.delitem(sys.modules, package.name)


def test_code_that_changed_meanwhile_is_not_kept(project: Project) -> None:
    """It may have been imported before the change, and would be known by what it is now."""
    older(project.folder / "bright.py")
    kept = Kept.of(read(project.file), HERE)
    (project.folder / "bright.py").touch()
    kept.write(MADE)
    assert not (project.folder / ".corefit").exists()


def test_a_config_that_changed_meanwhile_is_not_kept(project: Project) -> None:
    older(project.folder / "bright.py")
    kept = Kept.of(read(project.file), HERE)
    edited(project, "transformer", "config.json", num_layers=3)
    kept.write(MADE)
    assert not (project.folder / ".corefit").exists()


def test_a_backbone_that_does_not_say_what_it_read_has_none(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("corefit.train.estimate_cache.Configured", Project)  # which no backbone is
    kept = Kept.of(read(project.file), HERE)
    kept.write(MADE)
    assert kept.read() is None
    assert not (project.folder / ".corefit").exists()


# files


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(file.read_bytes()[:-20]),
        lambda file: file.write_text(file.read_text().replace("7", "8", 1)),
        lambda file: file.write_text("[]"),
        lambda file: (file.unlink(), file.mkdir()),
    ],
    ids=["empty", "cut", "edited", "a list", "a folder"],
)
def test_a_damaged_file_is_none(project: Project, kept: Kept, damage: Callable[[Path], None]) -> None:
    assert kept.file is not None
    damage(kept.file)
    assert again(project) is None


def test_few_files_are_kept(project: Project, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept.file is not None
    older(kept.file)
    monkeypatch.setattr(estimate_cache, "MOST", 2)
    for ranks in (2, 3):
        Kept.of(read(project.file), HERE, ranks).write(MADE)
    assert again(project) is None, "the oldest is gone"
    assert len(list(kept.file.parent.iterdir())) == 2


# the command


def counted(monkeypatch: pytest.MonkeyPatch) -> list[Pipeline]:
    """Those whose estimates are made from now on."""
    made: list[Pipeline] = []
    plain = estimate.estimates

    def estimates(pipeline: Pipeline, *args: Any, **keys: Any) -> list[Estimate]:
        made.append(pipeline)
        return plain(pipeline, *args, **keys)

    monkeypatch.setattr(estimate, "estimates", estimates)
    return made


def test_a_second_check_says_the_same(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    older(project.folder / "bright.py")
    made = counted(monkeypatch)
    first = project.main("check", "pipeline.toml")
    assert len(made) == 1
    assert project.main("check", "pipeline.toml") == first
    assert len(made) == 1
    edited(project, "transformer", "config.json", num_layers=3)
    other = project.main("check", "pipeline.toml")
    assert len(made) == 2
    parameters = [re.search(r"^parameters +(\S+)", ended.out, re.MULTILINE) for ended in (first, other)]
    assert parameters[0] != parameters[1]


def test_what_does_not_fit_is_refused_each_time_and_nothing_is_written(project: Project) -> None:
    older(project.folder / "bright.py")
    arguments = ("check", "pipeline.toml", "--memory", "0.1MiB", "--set", "backbone.train={use='full'}")
    before = project.tree()
    first = project.main(*arguments)
    assert first.status == 2
    assert project.main(*arguments) == first
    assert project.tree() == before


def test_data_are_checked_each_time(project: Project) -> None:
    older(project.folder / "bright.py")
    assert project.main("check", "pipeline.toml").status == 0
    (project.own("media") / "3.png").unlink()
    ended = project.main("check", "pipeline.toml")
    assert ended.status == 2
    assert "1 of 8 media are missing" in ended.err


@pytest.mark.parametrize("what", ["a file", "refused"])
def test_a_folder_that_takes_no_files_is_no_error(project: Project, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    older(project.folder / "bright.py")
    if what == "a file":
        (project.folder / ".corefit").write_text("mine")
    else:

        def refused(file: Path, data: bytes) -> None:
            raise OSError(30, "Read-only file system", str(file))

        monkeypatch.setattr(files, "write_whole", refused)
    before = project.tree()
    made = counted(monkeypatch)
    for _ in range(2):
        ended = project.main("check", "pipeline.toml")
        assert (ended.status, ended.err) == (0, "")
    assert len(made) == 2
    assert project.tree() == before


HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft", "streaming", "matplotlib", "pandas", "scipy")


def imported(project: Project) -> set[str]:
    """Which of HEAVY a check imports, in a process of its own."""
    said = (
        "import sys\nfrom corefit.cli import main\nsys.argv = ['corefit', 'check', 'pipeline.toml']\n"
        f"try:\n    main()\nexcept SystemExit as ended:\n    print(ended.code, *{{*{HEAVY}}} & sys.modules.keys())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", said], cwd=project.folder, capture_output=True, text=True, check=True, timeout=120
    )
    status, *found = done.stdout.splitlines()[-1].split()
    assert status == "0", done.stdout + done.stderr
    return {*found}


def test_a_second_check_imports_neither_torch_nor_diffusers(project: Project) -> None:
    older(project.folder / "bright.py")
    assert {"torch", "diffusers"} <= imported(project)
    wanted = {"torch"} if torch.cuda.is_available() else set[str]()  # which says what the GPU is
    assert imported(project) <= wanted
