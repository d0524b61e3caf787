"""Whether there may be a GPU, found out without torch where that is certain: importing torch takes seconds."""

from __future__ import annotations

import ctypes
import re
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

BUILT = re.compile(r"^(cuda|hip)\b[^=\n]*=[ \t]*(\S+)", re.MULTILINE)
"""In torch/version.py: what torch was built for, or None."""
DRIVER = "libcuda.so.1"
"""What CUDA's runtime loads to reach a device, on Linux."""
DEVICES = (
    *("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia"),
    *("/dev/nvhost-ctrl-gpu", "/dev/nvgpu", "/dev/nvmap"),  # of Jetson
    "/dev/dxg",  # of WSL
)
"""Files through which the driver reaches a device, where it lies in a folder that only torch's own libraries search."""


def may_be_there() -> bool:
    """Whether torch.cuda.is_available() may be true. False is certain, and torch is not imported for it.

    It is False where torch was built for neither CUDA nor ROCm, and where it was built for CUDA and Linux has no
    driver.
    """
    if "torch" in sys.modules:
        import torch

        return torch.cuda.is_available()
    found = _built_for()
    if found.get("hip") != "None" or "cuda" not in found or entry_points(group="torch.backends"):
        return True  # ROCm, a torch that does not say it, or a package that gives torch other devices
    return found["cuda"] != "None" and (sys.platform != "linux" or _has_driver())


def _built_for() -> dict[str, str]:
    """What torch/version.py says; nothing where it cannot be read."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return {}
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    return dict(BUILT.findall(text))


def _has_driver() -> bool:
    if any(Path(device).exists() for device in DEVICES):
        return True
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return False
    return True
