"""Models of transformers, and heads of linear layers, made of the tensors of published files."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from corefit.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

LAYERS = (0, 2, 4, 6, 7)
"""Numbers of the linear layers of a head; those between are dropout, which does nothing once it is trained."""
WIDTHS = (1024, 128, 64, 16, 1)
"""Widths of the published heads' layers."""


def read(kind: Any, config: Any, source: Path | Mapping[str, Tensor], **keys: Any) -> Any:
    """Return a model of transformers in float32, read from a folder or made of tensors by their names.

    Raises ModelError where files cannot be read, and where weights are missing or of another shape, which transformers
    would fill with random numbers.
    """
    folder = source if isinstance(source, Path) else None
    state = {} if folder else {"state_dict": dict(source)}  # pyright: ignore[reportArgumentType,reportCallIssue]
    with _without_bars():
        network, info = tried(
            lambda: kind.from_pretrained(
                folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **state, **keys
            ),
            folder,
        )
    wrong = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ModelError(
            f"{folder or 'the file'}: its weights lack {', '.join(wrong[:3])}{more}, or have them in another shape "
            "than the config says; fetch the whole model again"
        )
    return network.float()  # transformers 4 has read it in float32, and 5 in the file's type


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


def tried(make: Callable[[], Any], place: object) -> Any:
    """Call what reads files, and turn its errors into a ModelError that names the place."""
    from safetensors import SafetensorError

    try:
        return make()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        first = str(error).strip().partition("\n")[0]
        raise ModelError(f"{place}: transformers cannot read it: {first or type(error).__name__}") from error


def linear_head(tensors: Mapping[str, Tensor], file: object) -> nn.Sequential:
    """Return the head of LAION's aesthetic predictor, five linear layers without an activation, in float32.

    tensors  layers.0.weight, layers.0.bias and so on for the layers 0, 2, 4, 6 and 7; ModelError if they are others
    """
    from torch import nn

    expected = {f"layers.{number}.{kind}" for number in LAYERS for kind in ("weight", "bias")}
    shapes = [tuple(tensors[f"layers.{number}.weight"].shape) for number in LAYERS] if expected <= {*tensors} else []
    widths = [*(shape[-1] for shape in shapes), shapes[-1][0]] if shapes else []
    if not widths or widths[-1] != 1 or shapes != [(b, a) for a, b in pairwise(widths)]:
        raise ModelError(
            f"{file}: a head has the tensors layers.0, 2, 4, 6 and 7, weight and bias; each takes what the one before "
            f"gives, and the last gives one number; it has {', '.join(sorted(tensors)[:4]) or 'none'}"
        )
    head = nn.Sequential(*(nn.Linear(a, b, device="meta") for a, b in pairwise(widths)))
    stored = {f"{i}.{kind}": tensors[f"layers.{n}.{kind}"] for i, n in enumerate(LAYERS) for kind in ("weight", "bias")}
    head.load_state_dict({name: tensor.float() for name, tensor in stored.items()}, assign=True)
    return head


def blank_head(width: int) -> nn.Sequential:
    """Return a head for features of length `width` on the meta device, with the published widths otherwise."""
    from torch import nn

    return nn.Sequential(*(nn.Linear(a, b, device="meta") for a, b in pairwise((width, *WIDTHS))))


def numbered(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """Return how many blocks there are whose tensors' names begin with `pattern` and a number."""
    found = (re.match(rf"{pattern}\.(\d+)\.", name) for name in tensors)
    return len({match[1] for match in found if match})
