"""Configs of published models, for planning: what their JSON files say, without weights and tokenizers' vocabularies.

The folders have the layout of a diffusers folder. Sizes and memory can be computed from them offline; models cannot be
loaded.
"""

from pathlib import Path

from corefit.errors import ModelError

NAMES = (
    "SD3.5-medium",
    "SD3.5-large",
    "FLUX.1-dev",
    "Wan2.1-T2V-1.3B",
    "Wan2.1-T2V-14B",
    "Wan2.2-T2V-A14B",
)


def folder(name: str) -> Path:
    """Return the folder with the configs of a published model; ModelError for a name that is not in NAMES."""
    if name not in NAMES:
        raise ModelError(f"no configs of {name!r} are included; there are: {', '.join(NAMES)}")
    return Path(__file__).parent / name
