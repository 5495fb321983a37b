"""Fault points of a build with the feature `faults`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import greenroom._native as native

_fault: Any = getattr(native, "fault", None)


def available() -> bool:
    """Whether this is such a build."""
    return _fault is not None


def set_fault(name: str, actions: str) -> None:
    """What happens at the point from now on, as the crate `fail` writes it: ``1*sleep(5)``, ``return``, ``off``."""
    _fault(name, actions)


@contextlib.contextmanager
def fault(name: str, actions: str) -> Iterator[None]:
    """The same for a while."""
    set_fault(name, actions)
    try:
        yield
    finally:
        set_fault(name, "off")
