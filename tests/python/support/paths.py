"""Where things lie: the checkout, what was built, the environments of the two vLLM versions."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve()
LOGS = ROOT / "target" / "logs"
MODELS = ROOT / "target" / "models"

VENVS = {"0.32": ROOT / ".venv", "0.26": ROOT / ".venv-026"}
"""vLLM version → environment that holds it; `make venvs` makes them."""


CUDA = "cuda"
"""Stands for the version of the vLLM that the interpreter `GPU_PYTHON` has: on a GPU machine, whatever is there."""


def python_of(version: str) -> Path:
    """The interpreter that has this version of vLLM."""
    if version == CUDA:
        named = os.environ.get("GPU_PYTHON")
        if not named:
            raise FileNotFoundError("GPU_PYTHON must name the Python that has vLLM for CUDA")
        # Links are not followed: an environment's interpreter is known by its own path.
        return Path(shutil.which(named) or named).absolute()
    python = VENVS[version] / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(f"vLLM {version} is not installed in {VENVS[version].name}: run `make venvs`")
    return python


def greenroom_binary() -> Path:
    """The `greenroom` command: the one that `GREENROOM_COMMAND` names, the one of the installed wheel, or what cargo
    built last."""
    named = [Path(name).resolve() for name in (os.environ.get("GREENROOM_COMMAND"),) if name]
    built = [TARGET / kind / "greenroom" for kind in ("release", "debug")]
    built = sorted((path for path in built if path.exists()), key=lambda path: -path.stat().st_mtime)
    for path in (*named, Path(sys.prefix) / "bin" / "greenroom", VENVS["0.32"] / "bin" / "greenroom", *built):
        if path.exists():
            return path
    raise FileNotFoundError("no greenroom command: run `make install` (wheel) or `cargo build -p greenroom-sidecar`")
