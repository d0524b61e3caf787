"""How much energy GPUs have used, where NVIDIA's management library (the package nvidia-ml-py) can be asked."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attrs import frozen

if TYPE_CHECKING:
    import torch


def gpu_id(device: torch.device) -> str:
    """Return the identifier by which NVIDIA's tools know a GPU, "GPU-...", or "" for another device."""
    import torch

    if device.type != "cuda":
        return ""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "")  # versions of torch before 2.6 lack it
    return f"GPU-{uuid}" if uuid else ""


@frozen(eq=False)
class EnergyMeter:
    """Reads how much energy some GPUs of this machine have used together, other programs' use included."""

    library: Any
    gpus: Sequence[Any]

    @staticmethod
    def of(ids: Sequence[str]) -> EnergyMeter | None:
        """Return a meter for GPUs by their `gpu_id`; None if the library is missing or cannot tell of all of them."""
        if not ids or not all(ids) or importlib.util.find_spec("pynvml") is None:
            return None
        library: Any = importlib.import_module("pynvml")
        try:
            library.nvmlInit()
            meter = EnergyMeter(library, [library.nvmlDeviceGetHandleByUUID(each) for each in sorted(set(ids))])
            return None if meter.joules() is None else meter
        except library.NVMLError:
            return None

    def joules(self) -> float | None:
        """Return the energy since the driver was loaded, in joules; None if a GPU does not say."""
        try:
            return sum(self.library.nvmlDeviceGetTotalEnergyConsumption(gpu) for gpu in self.gpus) / 1000
        except self.library.NVMLError:
            return None
