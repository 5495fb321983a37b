"""Reads the plans and reports that travel between the connector's halves: postcard's encoding, see `engine/plan.rs`.

Written apart from the Rust code on purpose: the audit must not trust what it checks.
"""

from __future__ import annotations

import dataclasses

KINDS = ("demand", "prefetch", "save")
"""In the order of the enum `CopyClass`."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A copy job: `slots[i]` belongs to `blocks[i]`."""

    id: int
    kind: str
    boot: int
    slots: list[int]
    blocks: list[int]


@dataclasses.dataclass(frozen=True)
class Plan:
    """One step's work. A plan of no bytes is an empty one."""

    fence: list[int]
    cancel: list[int]
    loads: list[Job]
    saves: list[Job]


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one rank's part of a job ended."""

    id: int
    ok: bool


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def number(self) -> int:
        """A varint: seven bits a byte, the lowest first."""
        value = shift = 0
        while True:
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def flag(self) -> bool:
        value = self._data[self._at]
        self._at += 1
        if value > 1:
            raise ValueError(f"{value} is not a bool")
        return value == 1

    def numbers(self) -> list[int]:
        return [self.number() for _ in range(self.number())]

    def jobs(self) -> list[Job]:
        return [self._job() for _ in range(self.number())]

    def _job(self) -> Job:
        number, kind, boot = self.number(), KINDS[self.number()], self.number()
        pairs = [(self.number(), self.number()) for _ in range(self.number())]
        return Job(number, kind, boot, [slot for slot, _ in pairs], [block for _, block in pairs])

    def end(self) -> None:
        if self._at != len(self._data):
            raise ValueError(f"{len(self._data) - self._at} bytes are left over")


def read_plan(data: bytes) -> Plan:
    """Raises `ValueError` or `IndexError` if these bytes are not a plan."""
    if not data:
        return Plan([], [], [], [])
    reader = _Reader(data)
    plan = Plan(reader.numbers(), reader.numbers(), reader.jobs(), reader.jobs())
    reader.end()
    return plan


def read_report(data: bytes) -> list[Ended]:
    """Raises `ValueError` or `IndexError` if these bytes are not a report."""
    reader = _Reader(data)
    reader.number()  # the rank
    ended = []
    for _ in range(reader.number()):
        job, ok = reader.number(), reader.flag()
        reader.number()  # bytes
        reader.number()  # microseconds
        ended.append(Ended(job, ok))
    reader.end()
    return ended
