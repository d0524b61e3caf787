"""The device that a stage is to fit into: this machine's, or one that is planned."""

from __future__ import annotations

from attrs import frozen

from corefit.system import cuda
from corefit.system.ranks import is_half


@frozen
class Device:
    """The device of each process of a run: its bytes of memory, and whether it is a GPU."""

    name: str
    memory: float
    gpu: bool
    planned: bool = False
    """Whether it is a GPU of another machine. Such a one is taken to have bfloat16; the GPU of this one is asked."""

    @staticmethod
    def here() -> Device:
        """Return the device of this machine."""
        import psutil

        if cuda.may_be_there():
            import torch

            if torch.cuda.is_available():
                return Device(torch.cuda.get_device_name(), float(torch.cuda.mem_get_info()[1]), gpu=True)
        return Device("main memory", float(psutil.virtual_memory().total), gpu=False)

    @staticmethod
    def of(memory: float) -> Device:
        """Return a GPU of so many bytes, which this machine need not have."""
        return Device("the GPU planned", memory, gpu=True, planned=True)

    def half(self, precision: str) -> bool:
        """Return whether a pipeline's `precision` means bfloat16 on this device."""
        return is_half(precision) or (self.planned and precision == "auto")
