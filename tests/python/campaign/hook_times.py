"""What engines have written about their hooks while they ran; see `connector`."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from support.paths import LOGS
from support.tail import Tail

HOOK_TIMES = LOGS / f"hook-times-{os.getpid()}.jsonl"
"""All engines of this run write here."""


AFTER_S = 3.0
"""What is written so long after a span still counts to it."""


@dataclasses.dataclass(frozen=True)
class Calls:
    """Some of them."""

    count: int
    slow: Sequence[tuple[str, float, float, bool]]
    """Hook, wall and processor time in microseconds, whether other processes took the processor meanwhile."""

    def own_us(self, share: float) -> float:
        """Microseconds that only this share of the calls took longer than, of those that nobody else's process held up.

        A hook that waits is seen: it gives the processor away by itself. 0 if that is less than is written down.
        """
        return tail([wall for _, wall, _, taken in self.slow if not taken], self.count, share)

    def all_us(self, share: float) -> float:
        """The same of all calls: on a busy machine, how busy it is."""
        return tail([wall for _, wall, _, _ in self.slow], self.count, share)


class HookTimes:
    """What the engines have written about their hooks; see `connector`."""

    def __init__(self, path: Path = HOOK_TIMES) -> None:
        self._tail = Tail(path)
        self._lines: list[tuple[float, Calls]] = []
        self.waits: list[tuple[float, float]] = []
        """When it was written, and the milliseconds that a request was kept waiting."""

    def read(self) -> HookTimes:
        """Takes in what is new."""
        for line in self._tail.read():
            self._lines.append((line["at"], Calls(line["calls"], [*map(tuple, line["slow"])])))
            self.waits += [(line["at"], wait) for wait in line["waits_ms"]]
        return self

    def all(self) -> Calls:
        return _sum(calls for _, calls in self._lines)

    def during(self, spans: Sequence[tuple[float, float]]) -> Calls:
        """Those of any of these spans of time, and of the seconds after it."""
        return _sum(calls for at, calls in self._lines if any(begin < at <= end + AFTER_S for begin, end in spans))


def _sum(some: Iterable[Calls]) -> Calls:
    some = list(some)
    return Calls(sum(one.count for one in some), [slow for one in some for slow in one.slow])


def tail(longest: Sequence[float], total: int, share: float) -> float:
    """The value that this share of `total` values exceeds, of which only the longest are known; 0 for the others."""
    ranked = sorted(longest, reverse=True)
    place = int(total * share)
    return ranked[place] if place < len(ranked) else 0.0
