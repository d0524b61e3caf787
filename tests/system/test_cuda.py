"""Whether a GPU may be there, without torch: never False where torch would find one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from corefit.system import cuda
from corefit.system.ranks import is_half

CUDA = "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux without driver and devices, with a torch for CUDA that nothing has imported; its version.py."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('torch is imported')")
    version = tmp_path / "torch" / "version.py"
    version.write_text(CUDA)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(cuda, "entry_points", lambda group: [])
    monkeypatch.setattr(cuda, "DEVICES", (str(tmp_path / "nvidiactl"),))
    monkeypatch.setattr(cuda, "DRIVER", "libno_such_driver.so.1")
    monkeypatch.setattr(sys, "platform", "linux")
    return version


def test_without_a_driver_there_is_none(machine: Path) -> None:
    assert not cuda.may_be_there()
    assert not is_half("auto")
    assert is_half("bf16")
    assert not is_half("fp32")


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_torch_may_be_built_for_none(machine: Path, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.write_text("cuda: Optional[str] = None\nhip: Optional[str] = None\n")
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(cuda, "DRIVER", None)  # which every system could load
    assert not cuda.may_be_there()


@pytest.mark.parametrize(
    "text",
    [
        "cuda: Optional[str] = None\nhip: Optional[str] = '7.1'\n",
        "cuda = None\nhip = '7.1'\n",
        "cuda: Optional[str] = '13.0'\n",
        "hip: Optional[str] = None\n",
        "",
    ],
)
def test_rocm_and_what_does_not_say_may_have_one(machine: Path, text: str) -> None:
    machine.write_text(text)
    assert cuda.may_be_there()


def test_a_torch_without_version_file_may_have_one(machine: Path) -> None:
    machine.unlink()
    assert cuda.may_be_there()


def test_a_device_file_may_be_one(machine: Path) -> None:
    (machine.parent.parent / "nvidiactl").touch()
    assert cuda.may_be_there()


def test_a_driver_may_have_one(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "DRIVER", None)
    assert cuda.may_be_there()


def test_other_systems_than_linux_are_not_looked_at(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert cuda.may_be_there()


def test_packages_may_give_torch_other_devices(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "entry_points", lambda group: ["npu"] if group == "torch.backends" else [])
    assert cuda.may_be_there()


def test_it_agrees_with_torch_here() -> None:
    said = "import sys\nfrom corefit.system import cuda\nprint(cuda.may_be_there(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True)
    found, imported = done.stdout.split()
    assert imported == "False"
    assert found == "True" or not torch.cuda.is_available()
    assert cuda.may_be_there() == torch.cuda.is_available(), "once it is imported, torch is asked"
