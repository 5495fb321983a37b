"""Reads what `auditing` wrote, and judges it: a block that came back has the bytes that were saved under its hash."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from support.tail import Tail

Slot = tuple[int, int]
"""(boot id of the sidecar, slot)."""


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a slot holds."""

    block_hash: str
    digest: str
    """Of each rank's shard, in the order of the ranks."""


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A block that came back."""

    at: float
    kind: str
    block_hash: str


@dataclasses.dataclass(frozen=True)
class Turn:
    """A request as vLLM's scheduler saw it. `end` is None while it runs."""

    request_id: str
    start: float
    end: float | None
    hashes: list[str]
    """Full blocks of its prompt."""
    aborted: bool = False
    """Its client hung up before it ended."""


@dataclasses.dataclass
class Audit:
    """The verdict. `problems` says in words what is wrong."""

    loads: list[Loaded] = dataclasses.field(default_factory=list)
    saved_blocks: int = 0
    failed_jobs: dict[str, int] = dataclasses.field(default_factory=dict)
    turns: dict[str, Turn] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    spans: dict[tuple[str, int], tuple[float, float]] = dataclasses.field(default_factory=dict)
    """When each job of each engine was planned and when it was reported: never, if the engine died first."""
    open: dict[tuple[str, int], list[Slot]] = dataclasses.field(default_factory=dict)
    """Jobs that have been planned and not been reported, with the slots that they copy from or to."""
    saved_by_boot: Counter[int] = dataclasses.field(default_factory=Counter)
    """Blocks saved to each start of a sidecar."""

    def turn(self, name: str) -> Turn:
        """The only request whose id contains `name` between dashes, as vLLM makes it of `X-Request-Id`."""
        found = [turn for turn in self.turns.values() if f"-{name}-" in f"-{turn.request_id}-"]
        assert len(found) == 1, f"{len(found)} requests are called {name}"
        return found[0]

    def running(self, at: float | None = None) -> int:
        """Jobs that had been planned and not been reported at that time, or up to now."""
        if at is None:
            return len(self.open)
        return sum(start <= at < end for start, end in self.spans.values())

    def copied(self, boot: int) -> set[int]:
        """Slots of this start of a sidecar that copies under way may touch."""
        return {slot for slots in self.open.values() for of, slot in slots if of == boot}

    def bury(self) -> None:
        """The engine is dead: what it had not reported will never be."""
        self.open.clear()

    def count(self, kind: str) -> int:
        """Blocks that loads of this kind brought back."""
        return sum(load.kind == kind for load in self.loads)


@dataclasses.dataclass
class _Job:
    """A copy job, as far as it has been told."""

    kind: str
    slots: list[Slot]
    hashes: list[str] | None
    ranks: int
    saving: dict[int, list[str]] = dataclasses.field(default_factory=dict)
    """What each rank was about to save."""
    ended: dict[int, list[str] | None] = dataclasses.field(default_factory=dict)
    """What each rank that has reported had brought back: None of a save, and of what failed."""
    ok: bool = True
    found: list[Saved | None] = dataclasses.field(default_factory=list)
    """What the slots held when a load ended."""


class _Judge:
    def __init__(self) -> None:
        self.audit = Audit()
        self.jobs: dict[tuple[str, int], _Job] = {}
        self.content: dict[Slot, Saved] = {}

    def take(self, record: Mapping[str, Any]) -> None:
        """Records come in the order in which they were written; whatever depends on another is written after it."""
        event, at = record["event"], record["at"]
        name = (record["engine"], record.get("job", -1))
        if event == "request":
            turn = Turn(record["id"], at, None, record["hashes"])
            self.audit.turns[turn.request_id] = turn
        elif event == "finished":
            turn = self.audit.turns[record["id"]]
            self.audit.turns[turn.request_id] = dataclasses.replace(turn, end=at, aborted=record["aborted"])
        elif event == "planned":
            slots = [(record["boot"], slot) for slot in record["slots"]]
            self.audit.spans[name] = (at, math.inf)
            self.audit.open[name] = slots
            self.jobs[name] = _Job(record["kind"], slots, record["hashes"], record["ranks"])
            if record["kind"] == "save":
                for slot in slots:
                    # From here on nobody may read it.
                    self.content.pop(slot, None)
        elif event == "saving":
            self.jobs[name].saving[record["rank"]] = record["digests"]
        elif event == "ended":
            job = self.jobs[name]
            job.ok &= record["ok"]
            job.ended[record["rank"]] = record["digests"]
            if len(job.ended) == job.ranks:
                self._ended(name, at, job)
        elif event == "published":
            self._published(name, at, record["hashes"])

    def _ended(self, name: tuple[str, int], at: float, job: _Job) -> None:
        """The last rank has reported."""
        self.audit.spans[name] = (self.audit.spans[name][0], at)
        self.audit.open.pop(name, None)
        if job.kind != "prefetch" or not job.ok:
            # A prefetch that ended well is published afterwards.
            del self.jobs[name]
        if not job.ok:
            self.audit.failed_jobs[job.kind] = self.audit.failed_jobs.get(job.kind, 0) + 1
        elif job.kind == "save":
            assert job.hashes is not None
            if len(job.saving) < job.ranks:
                self.audit.problems.append(f"save {name} ended and never started")
                return
            for slot, block_hash, digest in zip(job.slots, job.hashes, _whole(job.saving), strict=True):
                self.content[slot] = Saved(block_hash, digest)
            self.audit.saved_blocks += len(job.slots)
            self.audit.saved_by_boot.update(boot for boot, _ in job.slots)
        else:
            job.found = [self.content.get(slot) for slot in job.slots]
            for slot, digest, found in zip(job.slots, _whole(job.ended), job.found, strict=True):
                if found is None:
                    self.audit.problems.append(f"{job.kind} {name} read {slot}, which holds no finished save")
                elif found.digest != digest:
                    self.audit.problems.append(
                        f"{job.kind} {name} brought {digest} of {slot}, "
                        f"where {found.digest} was saved as {found.block_hash}"
                    )
            if job.hashes is not None:
                self._named(name, job, at, job.hashes)

    def _published(self, name: tuple[str, int], at: float, hashes: list[str]) -> None:
        job = self.jobs.pop(name, None)
        if job is None or not job.found:
            self.audit.problems.append(f"prefetch {name} was published and has not ended well")
        else:
            self._named(name, job, at, hashes)

    def _named(self, name: tuple[str, int], job: _Job, at: float, hashes: list[str]) -> None:
        """A load's blocks go by these hashes now."""
        for slot, block_hash, found in zip(job.slots, hashes, job.found, strict=True):
            if found is not None and found.block_hash != block_hash:
                self.audit.problems.append(
                    f"{job.kind} {name} took {slot} for {block_hash}, and {found.block_hash} was saved there"
                )
            self.audit.loads.append(Loaded(at, job.kind, block_hash))


def _whole(shards: Mapping[int, list[str] | None]) -> list[str]:
    """The digests of blocks out of those of their shards."""
    by_rank = [shards[rank] or [] for rank in sorted(shards)]
    return ["/".join(block) for block in zip(*by_rank, strict=True)]


def judge(records: Iterable[Mapping[str, Any]]) -> Audit:
    """Goes through a whole log."""
    judging = _Judge()
    for record in records:
        judging.take(record)
    return judging.audit


class Follower:
    """A log that is still being written."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)
        self._judge = _Judge()

    def audit(self) -> Audit:
        """The verdict up to now."""
        for record in self._tail.read():
            self._judge.take(record)
        return self._judge.audit
