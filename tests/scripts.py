"""Loads a script, such as one of examples/, as the module that it is when it runs beside the others of its folder."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any


def load(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec
    assert spec.loader
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
