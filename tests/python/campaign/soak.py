"""A long run: memory, descriptors, threads, slots and latency over time, and what is to be said of them.

Processes are killed in the first third only. After it they are stopped and starved, and none ends: what they may grow
to, their tables and Python's heap, they have reached by the second half, and who grows there, grows without end.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from campaign.plan import ENGINE_STOPS, SIDECAR_ACTS, Act, draw
from campaign.runner import Campaign
from campaign.servers import descriptors, members
from campaign.tally import Row, Tally
from demo.stats import percentile
from real_vllm.harness import envelope
from support import rest

SAMPLE_S = 5.0
GENTLE = ("stop_sidecar", "stop_worker", "stop_scheduler", "exhaust_descriptors", "step_clock")
"""Acts that no process ends by."""
JUDGED = ("sidecar", "EngineCore", "Worker")
"""Processes that Greenroom runs in. vLLM's front end is drawn and not judged."""
GROWTH_MAX_MIB = {"sidecar": 1.0, "EngineCore": 8.0, "Worker": 8.0}
"""Of anonymous memory over the second half, by regression, however long it is: what Python's heap moves by itself."""
NOISE = 2.0
"""Growth within so many standard deviations of the residuals is none."""
ANSWERS_KEPT = 4096
"""Envelopes whose answers a sidecar remembers (`REMEMBERED_MAX` in `actor/hints.rs`)."""
FULL_SHARE = 0.98
"""Of the most slots that are ever used: from then on the arena is as full as it gets, and so is its index."""
GROWTH_MAX_COUNT = 1.0
"""Descriptors or threads, between the first and the last third of the second half."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """One moment."""

    at: float
    """Seconds since the start."""
    processes: dict[str, dict[str, float]]
    """Role → `rss_mib`, `anon_mib`, `descriptors`, `threads`; `pid` tells whether it is still the same."""
    slots: dict[str, int]
    turns: int
    """Answered since the sample before."""
    ttft_ms: dict[str, float]
    """`p50` and `p95` of those."""


class Sampler(threading.Thread):
    """Samples until it is told to stop."""

    def __init__(self, campaign: Campaign) -> None:
        super().__init__(daemon=True)
        self._campaign = campaign
        self._stop_event = threading.Event()
        self._turns = 0
        self.began = time.monotonic()
        self.samples: list[Sample] = []

    def run(self) -> None:
        while not self._stop_event.wait(SAMPLE_S):
            self.samples.append(self._sample())

    def end(self) -> None:
        self._stop_event.set()
        self.join()

    def _sample(self) -> Sample:
        processes = {}
        for role, pid in self._pids():
            with contextlib.suppress(OSError):
                processes[role] = measure(pid)
        slots: dict[str, int] = {}
        # Nobody answers while it is stopped or dead.
        with contextlib.suppress(Exception):
            status = rest.call("GET", self._campaign.sidecar.url + "/v1/status", timeout_s=1)
            host = status["tiers"]["host"]
            slots = {state: int(host[f"slots_{state}"]) for state in ("used", "leased", "draining")}
        turns = self._campaign.tally.turns[self._turns :]
        self._turns += len(turns)
        times = [turn.ttft_ms for turn in turns]
        ttft = {"p50": percentile(times, 0.5), "p95": percentile(times, 0.95)} if times else {}
        return Sample(time.monotonic() - self.began, processes, slots, len(turns), ttft)

    def _pids(self) -> Iterator[tuple[str, int]]:
        if self._campaign.sidecar.alive():
            yield "sidecar", self._campaign.sidecar.pid
        for title in ("EngineCore", "Worker"):
            for one in members(self._campaign.rig, title):
                yield title, one.pid
        process = self._campaign.rig.vllm.process
        if process is not None and process.running():
            yield "front end", process.pid


def measure(pid: int) -> dict[str, float]:
    """Of one process; raises `OSError` if it is gone."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())

    def mib(name: str) -> float:
        return round(int(status[name].split()[0]) / 1024, 2) if name in status else 0.0

    return {
        "pid": pid,
        "rss_mib": mib("VmRSS"),
        "anon_mib": mib("RssAnon"),
        "descriptors": len(descriptors(pid)),
        "threads": int(status["Threads"]),
    }


def acts(seed: int, deaths_over: threading.Event) -> Iterator[Act]:
    """One death of vLLM at the beginning, then what it survives, then what everybody survives."""
    dying = next(draw(seed, death_every=1))
    surviving, gentle = draw(seed, SIDECAR_ACTS + ENGINE_STOPS, 0), draw(seed, GENTLE, 0)
    for number in itertools.count(1):
        act = dying if number == 2 else next(gentle if deaths_over.is_set() else surviving)
        yield dataclasses.replace(act, number=number)


@dataclasses.dataclass(frozen=True)
class Trend:
    """A straight line through a series: its growth from end to end, and the standard deviation around it."""

    growth: float
    noise: float


def trend(points: Sequence[tuple[float, float]]) -> Trend:
    """Least squares over (seconds, value); needs two different times."""
    slope, intercept = statistics.linear_regression([at for at, _ in points], [value for _, value in points])
    residuals = [value - (intercept + slope * at) for at, value in points]
    return Trend(slope * (points[-1][0] - points[0][0]), statistics.pstdev(residuals))


def rise(points: Sequence[tuple[float, float]]) -> float:
    """From the median of the first third to that of the last: moments in which an act holds some do not count."""
    values, third = [value for _, value in points], len(points) // 3
    return statistics.median(values[-third:]) - statistics.median(values[:third])


def series(samples: Sequence[Sample], role: str, what: str) -> list[tuple[float, float]]:
    return [(one.at, one.processes[role][what]) for one in samples if role in one.processes]


def warm(samples: Sequence[Sample], half_s: float) -> list[Sample]:
    """The second half, from when the arena of the sidecar that lives through it is full, if it was not before."""
    late = [one for one in samples if one.at >= half_s]
    most = max((one.slots.get("used", 0) for one in late), default=0)
    return list(itertools.dropwhile(lambda one: one.slots.get("used", 0) < FULL_SHARE * most, late))


def fill(url: str) -> None:
    """As many hints as a sidecar remembers the answers of: what it may grow by is not to look like what it must not."""
    for number in range(ANSWERS_KEPT):
        body = envelope(f"fill-{number}", ("kv.prefetch", "nobody"))
        with contextlib.suppress(rest.HttpError):
            rest.call("POST", url + "/v1/hints", body)


def judge(samples: Sequence[Sample], half_s: float) -> list[Row]:
    """What is to be said of the second half, once what is bounded has reached its bounds."""
    late = warm(samples, half_s)
    made = []
    for role in JUDGED:
        pids = {value for _, value in series(late, role, "pid")}
        made.append(Row(f"{role}: one process all through the second half", str(len(pids)), len(pids) == 1))
        if len(series(late, role, "anon_mib")) < 10:
            made.append(Row(f"{role}: samples", "too few", False))
            continue
        anon = trend(series(late, role, "anon_mib"))
        bound = max(GROWTH_MAX_MIB[role], NOISE * anon.noise)
        text = f"{anon.growth:+.2f} MiB, noise {anon.noise:.2f}, limit {bound:.2f}"
        made.append(Row(f"{role}: growth of anonymous memory in the second half", text, anon.growth <= bound))
        for what in ("descriptors", "threads"):
            more = rise(series(late, role, what))
            text = f"{more:+g}, limit {GROWTH_MAX_COUNT:g}"
            made.append(Row(f"{role}: growth of {what} in the second half", text, more <= GROWTH_MAX_COUNT))
    return made


def run(campaign: Campaign, seed: int, minutes: float) -> tuple[list[Sample], list[dict[str, Any]], float]:
    """Rounds until the time is over. Samples, acts with their times, and when the second half began.

    Raises `Failed`.
    """
    sampler, deaths_over, done = Sampler(campaign), threading.Event(), []
    sampler.start()
    half_s = minutes * 30
    try:
        for act in acts(seed, deaths_over):
            elapsed = time.monotonic() - sampler.began
            if elapsed > minutes * 60:
                break
            if elapsed > minutes * 20 and not deaths_over.is_set():
                deaths_over.set()
                half_s = max(half_s, elapsed)
                fill(campaign.sidecar.url)
                continue
            done.append({"at": round(elapsed, 1), "act": str(act)})
            campaign.round(act)
    finally:
        sampler.end()
    return sampler.samples, done, half_s


def latency(tally: Tally) -> Row:
    times = [turn.ttft_ms for turn in tally.turns]
    return Row(
        "time to first token, ms (P50, P95, P99)", ", ".join(f"{percentile(times, q):.0f}" for q in (0.5, 0.95, 0.99))
    )
