"""What a campaign has seen, and what it says to that."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence

from campaign.hook_times import Calls, HookTimes
from campaign.plan import DEATHS
from demo.stats import percentile
from real_vllm.harness import Difference

HOOK_LIMIT_US = 200.0
"""A hook's limit by design (P99, 100 sessions); `HOOK_OVER_US` beyond it is what 99.9 % of the calls may take."""
HOOK_OVER_US = 1000.0
WAIT_LIMIT_MS = 50.0
"""`lookup_wait_ms`, as users have it: what a request may wait for a sidecar that does not answer."""
WAIT_OVER_MS = 1.0
OUTLIVED_AFTER = 2
"""After so many schedulers that were killed beside a stopped worker, one of them must have been killed mid-copy."""


@dataclasses.dataclass
class Turn:
    """One answered request: when, milliseconds to its first token, cached and all tokens of its prompt."""

    at: float
    ttft_ms: float
    cached: int
    prompt: int


@dataclasses.dataclass
class Tally:
    """Counts of a run. What is wrong stands in words in `problems`, `hung`, `failed` and `difference`."""

    acts: Counter[str] = dataclasses.field(default_factory=Counter)
    mid_copy: Counter[str] = dataclasses.field(default_factory=Counter)
    """Acts that met at least one copy under way."""
    copies: int = 0
    """Copies that were under way at the acts."""
    turns: list[Turn] = dataclasses.field(default_factory=list)
    aborted: int = 0
    lost: int = 0
    """Requests of a vLLM that was killed."""
    hung: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    difference: Difference = dataclasses.field(default_factory=Difference)
    told: Counter[int] = dataclasses.field(default_factory=Counter)
    """Answers to tool events and hints by HTTP status; 0: nobody answered."""
    found_s: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Seconds from a sidecar's or an engine's start to the two knowing each other, by act."""
    hits: Counter[str] = dataclasses.field(default_factory=Counter)
    """Probes that came back from the arena, by act; the others are problems."""
    inherited: int = 0
    """Deaths of vLLM after which the next one hit what the dead one had saved, without saving it anew."""
    outlived: int = 0
    """Schedulers killed while a stopped worker had copies under way, whose slots were watched until it was gone."""
    vllm_starts: int = 0
    sidecar_starts: int = 0
    slots_over: int = 0
    """Used slots that no finished save explains."""
    not_kept: Counter[int] = dataclasses.field(default_factory=Counter)
    """Blocks of saves that ended well and were not published all the same, by start of a sidecar."""
    slots_left: int = 0
    """Slots leased or draining when nothing was going on any more."""
    running_ms: list[float] = dataclasses.field(default_factory=list)
    """TTFT of prompts of which the arena has the first block, with a sidecar that answers."""
    stopped_ms: list[float] = dataclasses.field(default_factory=list)
    """The same, turn by turn, with a stopped sidecar."""
    stopped_waits_ms: list[float] = dataclasses.field(default_factory=list)
    """What those requests were kept waiting by the hooks, by the engine's own clock."""
    cached_of_other_weights: list[int] = dataclasses.field(default_factory=list)
    """Tokens of a known prompt that were cached after other files lay under the same path, and after an update."""
    died_of_memory: int = 0
    """Sidecars that could not have what they needed; the others went on."""
    lingered: int = 0
    """Deaths of a process after which vLLM did not end by itself."""
    without_sidecar: list[tuple[float, float]] = dataclasses.field(default_factory=list)
    """From before the death of a sidecar that vLLM outlived until another one had been started."""
    problems: list[str] = dataclasses.field(default_factory=list)

    def unexplained(self, boot: int, stored: int, used: int) -> int:
        """Used slots of this start of a sidecar that no save explains; `stored`: blocks saved there and not evicted.

        All figures are of one moment. A block that was once not kept explains no slot later on: without that, each of
        them would hide a leak.
        """
        not_kept = stored - used
        self.not_kept[boot] = max(self.not_kept[boot], not_kept)
        return self.not_kept[boot] - not_kept

    def cost_ms(self) -> tuple[float, float, float]:
        """What a new request pays for a stopped sidecar: the median over pairs, and its 95 % interval."""
        pairs = zip(self.stopped_ms, self.running_ms, strict=True)
        ranked = sorted(stopped - running for stopped, running in pairs)
        # Of the normal approximation to how many pairs lie below the median.
        outside = max(int(len(ranked) / 2 - 0.98 * math.sqrt(len(ranked))), 0)
        return statistics.median(ranked), ranked[outside], ranked[-1 - outside]


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the summary. `ok` is None where there is nothing to judge."""

    name: str
    value: str
    ok: bool | None = None
    timed: bool = False
    """Whether it judges times, which want a machine of their own."""


def rows(tally: Tally, hooks: HookTimes) -> list[Row]:
    """The summary."""
    five_hundreds = sum(count for status, count in tally.told.items() if status >= 500 and status != 503)
    found = [one for each in tally.found_s.values() for one in each]
    wrong, hung, failed = len(tally.difference.wrong), len(tally.hung), len(tally.failed)
    ties = len(tally.difference.near_ties)
    beside = tally.acts["stop_worker_kill_scheduler"]
    made = [
        Row("rounds", str(tally.acts.total())),
        *(Row(f"  {name.replace('_', ' ')}", _act(tally, name)) for name in sorted(tally.acts)),
        Row("copies under way at the acts", str(tally.copies), tally.copies > 0),
        Row(
            "schedulers killed beside a stopped worker, mid-copy: its slots were watched",
            f"{beside}, {tally.outlived}",
            tally.outlived > 0 if beside >= OUTLIVED_AFTER else None,
        ),
        Row(
            "deaths of vLLM after which the next one hit what was saved before",
            str(tally.inherited),
            tally.inherited > 0 if any(tally.acts[name] for name in DEATHS) else None,
        ),
        Row("starts of a sidecar, of vLLM", f"{tally.sidecar_starts}, {tally.vllm_starts}"),
        Row("sidecars that died for want of memory", str(tally.died_of_memory)),
        Row("vLLM had to be killed after a death", str(tally.lingered)),
        Row("requests answered, hung up, lost", f"{len(tally.turns)}, {tally.aborted}, {tally.lost}"),
        Row("tokens compared, wrong answers", f"{tally.difference.tokens}, {wrong}", wrong == 0),
        Row("near ties (float noise)", str(ties), ties <= tally.difference.tokens // 1000 + 1),
        Row("hung requests", str(hung), hung == 0),
        Row("failed requests", str(failed), failed == 0),
        Row(
            "leaked slots: unexplained, leased or draining", f"{tally.slots_over}, {tally.slots_left}", not leaks(tally)
        ),
        Row("blocks saved and not kept (too late, reset or retired meanwhile)", str(tally.not_kept.total())),
        Row("found again after, s (P50, longest)", f"{percentile(found, 0.5):.2f}, {max(found, default=0):.2f}"),
        Row("tool events and hints, by status", str(dict(sorted(tally.told.items()))), five_hundreds == 0),
        _hook_times("hook calls", hooks.all()),
    ]
    if tally.without_sidecar:
        made.append(
            _hook_times(
                "  from a sidecar's death until after the next one's start", hooks.during(tally.without_sidecar)
            )
        )
    if tally.stopped_ms:
        (cost, low, high), waits = tally.cost_ms(), tally.stopped_waits_ms
        longest = max(waits, default=float("nan"))
        made += [
            Row(
                f"a stopped sidecar costs a new request, ms (95 %), limit {WAIT_LIMIT_MS:g}",
                f"{cost:.1f} ({low:.1f} to {high:.1f})",
                cost <= WAIT_LIMIT_MS,
                timed=True,
            ),
            Row(
                f"  kept waiting by the hooks, ms (longest of {len(waits)}), limit {WAIT_LIMIT_MS + WAIT_OVER_MS:g}",
                f"{longest:.1f}",
                longest <= WAIT_LIMIT_MS + WAIT_OVER_MS,
                timed=True,
            ),
        ]
    if tally.cached_of_other_weights:
        cached = tally.cached_of_other_weights
        text = ", ".join(map(str, cached))
        made.append(Row("cached tokens with other files under the path, after an update", text, not any(cached)))
    return [*made, Row("other problems", str(len(tally.problems)), not tally.problems)]


def _hook_times(name: str, calls: Calls) -> Row:
    own_us, all_us = calls.own_us(0.001), calls.all_us(0.001)
    return Row(
        f"{name}, P99.9 in ms (with what other processes took), limit {(HOOK_LIMIT_US + HOOK_OVER_US) / 1e3:g}",
        f"{calls.count}, {own_us / 1e3:.3f} ({all_us / 1e3:.3f})",
        calls.count > 0 and own_us <= HOOK_LIMIT_US + HOOK_OVER_US,
        timed=True,
    )


def leaks(tally: Tally) -> bool:
    return tally.slots_over > 0 or tally.slots_left > 0


def _act(tally: Tally, name: str) -> str:
    found = tally.found_s.get(name)
    after = f", found again after {max(found):.1f} s at most" if found else ""
    return f"{tally.acts[name]}, {tally.mid_copy[name]} of them mid-copy, {tally.hits[name]} hit afterwards{after}"


def table(made: Sequence[Row]) -> str:
    """For people."""
    mark = {None: "     ", True: "ok   ", False: "WRONG"}
    width = max(len(row.name) for row in made)
    return "\n".join(f"{mark[row.ok]} {row.name:<{width}}  {row.value}" for row in made)


def wrongs(tally: Tally) -> list[str]:
    """Everything that is wrong, one by one."""
    return [*tally.difference.wrong, *tally.hung, *tally.failed, *tally.problems]
