"""Read a part of a diffusers folder completely, or raise a ModelError that names the part, the tensor and the file."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.errors import ModelError

if TYPE_CHECKING:
    import torch

OUTER = "text_model."
"""Prefix of a CLIPTextModel's weights in transformers 4; version 5 leaves it out, and 4 cannot read such names."""
LISTED = 5
"""Names of tensors that a message lists at most."""


def of_diffusers(name: str) -> Any:
    """A class of diffusers. What the first import makes is not searched for garbage, neither then nor later.

    That would be a fifth of the time to the first step: there are half a million objects, and nearly all of them stay.
    """
    first = "diffusers" not in sys.modules and gc.isenabled()
    if first:
        gc.collect()
        gc.disable()
    try:
        import diffusers

        return getattr(diffusers, name)
    finally:
        if first:
            gc.freeze()
            gc.enable()
            atexit.register(gc.unfreeze)  # or nanobind, in triton, says at the end that all of this leaks


def read(kind: Any, folder: Path, dtype: torch.dtype, variant: str | None = None) -> Any:
    """The model of class `kind` in `folder`, on the CPU, converted to `dtype`.

    ModelError, which names the file, if weights are missing, damaged, of another shape or not part of the model, so
    that no weight is left random. Buffers that the model computes itself may be in the file or not.
    """
    model, info = _loaded(kind, folder, dtype, variant)
    if info["missing_keys"] and set(info["missing_keys"]) == {f"{OUTER}{name}" for name in info["unexpected_keys"]}:
        model, info = _loaded(kind, folder, dtype, variant, key_mapping={"^(?=.)": OUTER})
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{_read_first(folder, variant)}: the weights of {folder.name} lack {_some(missing)}, which would be "
            "random: fetch the file again"
        )
    if left := sorted(set(info["unexpected_keys"]) - {name for name, _ in model.named_buffers()}):
        raise ModelError(
            f"{_holding(folder, left[0]) or folder}: {folder.name} should be a {kind.__name__}, which has no "
            f"{_some(left)}; weights and config.json are of different models"
        )
    return model


def _loaded(kind: Any, folder: Path, dtype: torch.dtype, variant: str | None, **more: Any) -> tuple[Any, Any]:
    """The model that `from_pretrained` returns, and its report on the weights."""
    with reading(folder, kind), _without_bars():
        return kind.from_pretrained(
            folder, variant=variant, use_safetensors=True, output_loading_info=True, **{_dtype_key(kind): dtype}, **more
        )


def _dtype_key(kind: Any) -> str:
    """Return the name of the argument for the dtype, which later versions of transformers 4 have renamed."""
    from transformers import PretrainedConfig, PreTrainedModel

    return "dtype" if issubclass(kind, PreTrainedModel) and hasattr(PretrainedConfig(), "dtype") else "torch_dtype"


@contextmanager
def _without_bars() -> Generator[None]:
    """Read weights without a progress bar for each model, as transformers 5 shows; downloads keep theirs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def reading(folder: Path, kind: Any = None) -> Generator[None]:
    """Turn what the libraries raise for bad files of `folder` into a ModelError that names the file.

    kind  class of the model, if it is weights that are read
    """
    try:
        yield
    except Exception as e:  # neither library checks the files that it reads, so they may raise anything
        raise ModelError(_damaged(folder) or (kind and _wrong_model(kind, folder)) or f"{folder}: {e}") from e


def _damaged(folder: Path) -> str | None:
    """A message about the first weights file under `folder` that cannot be read, or None."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                if (weights.metadata() or {"format": "pt"}).get("format") != "pt":
                    return f"{file}: its metadata does not say that it was written by torch (format: pt); save it again"
        except (OSError, SafetensorError) as e:
            return f"{file}: damaged or incomplete ({e}); fetch it again"
    return None


def _wrong_model(kind: Any, folder: Path) -> str | None:
    """A message about the first tensor whose shape does not fit config.json, or None."""
    with described(kind, folder / "config.json"):
        expected = {name: list(t.shape) for name, t in blank(kind, folder).state_dict().items()}
    for file, shapes in _shapes(folder):
        for name, shape in shapes.items():
            names = (name, f"{OUTER}{name}", name.removeprefix(OUTER))
            wanted = next((expected[n] for n in names if n in expected), shape)
            if shape != wanted:
                return f"{file}: {name} has the shape {shape}; according to config.json a {kind.__name__} has {wanted}"
    return None


@contextmanager
def described(kind: Any, file: Path) -> Generator[None]:
    """Turn what a class raises for wrong settings into a ModelError that names `file`.

    The models of diffusers and transformers do not check their arguments, so they may raise anything.
    """
    try:
        yield
    except Exception as e:
        raise ModelError(f"{file}: no {kind.__name__} can be made from it: {e}") from e


def blank(kind: Any, folder: Path) -> Any:
    """The model described by config.json, on the meta device."""
    import torch

    with torch.device("meta"):
        if hasattr(kind, "config_class"):  # a model of transformers
            return kind(kind.config_class.from_pretrained(folder))
        return kind.from_config(kind.load_config(folder))


def _shapes(folder: Path) -> Iterable[tuple[Path, Mapping[str, list[int]]]]:
    """Each weights file with the shapes of its tensors; no values are read."""
    from safetensors import safe_open

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            yield file, {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118


def _read_first(folder: Path, variant: str | None) -> Path:
    """The file to name in a message: the index of several weights files, or else the only one."""
    files = [*sorted(folder.glob("*.safetensors.index*.json")), *sorted(folder.glob("*.safetensors"))]
    return next(
        (f for f in files if (variant is not None) == (f".{variant}." in f.name)), files[0] if files else folder
    )


def _holding(folder: Path, name: str) -> Path | None:
    return next((file for file, shapes in _shapes(folder) if name in shapes), None)


def _some(names: list[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
