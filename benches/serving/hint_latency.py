"""From a client's hint to the copy: the engine is idle, a waiting session has been evicted from its pool.

The clock starts in this process before the hint is sent over HTTP and stops in vLLM's worker when the copy has been
handed to the copy thread (`witness`): CLOCK_MONOTONIC is the machine's. The baseline is the same hint for a session
that is on the GPU already. It takes the same way, through the sidecar, the socket, the sleeping engine and vLLM's step,
and ends with nothing to copy; what lies between the two is what finding and submitting the copy costs.

Idle means that vLLM's worker sleeps: it spins for a second after its last step, and is found sooner meanwhile. An agent
that waits for a tool on an engine that nobody else uses finds it asleep, so that is what a sample needs (`--idle`).
"""

from __future__ import annotations

import argparse
import dataclasses
import http.client
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from demo.report import Bar
from demo.stats import percentile
from real_vllm import steps
from serving import report
from serving.report import say
from support import rest
from support.paths import LOGS, ROOT
from support.process import wait_until
from support.servers import Connector, Rig, VllmConfig, rig
from support.tail import Tail

SAMPLES = 102
SAMPLES_MIN = 100
"""For figures that prove something; P95 of fewer hangs on a handful of them."""
SECONDS = 300.0
IDLE_S = 1.1
JITTER_S = 0.05
"""Added to the idle time at random, so that samples do not keep step with anything periodic."""

EVICTED = 3
"""Sessions that one flood evicts: a hint each."""
BLOCKS = 20
POOL = 100
EXTRA_ROUNDS = 8
ANSWER_TOKENS = 8
SETTLED_S = 0.1
STEP_WAIT_S = 5.0
BACK_WAIT_S = 5.0
RESIDENT = "resident"
VERBS = ("kv.prefetch", "tool_end")
ARMS = ("hint", "empty")
P50_MAX_MS, P95_MAX_MS = 2.0, 5.0

STEPS_LOG = LOGS / f"steps-{os.getpid()}.jsonl"
WITNESSED = VllmConfig(
    gpu_blocks=POOL,
    max_model_len=2048,
    dev_mode=False,
    connector=Connector("WitnessedConnector", "serving.witness"),
    env=(
        ("PYTHONPATH", f"{ROOT / 'tests/python'}:{Path(__file__).resolve().parents[1]}"),
        ("GREENROOM_STEPS", str(STEPS_LOG)),
    ),
)


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that the worker had begun at `at` (CLOCK_MONOTONIC, nanoseconds).

    `loads`: kind of each job and the slots that it reads. `saves`: the slots that each job writes.
    """

    at: int
    computes: bool
    loads: tuple[tuple[str, tuple[int, ...]], ...] = ()
    saves: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Sample:
    """One hint. Times are milliseconds since it was sent; `step_ms` is NaN when the worker never heard of it."""

    arm: str
    verb: str
    step_ms: float
    answer_ms: float
    idle_s: float
    first_step_ms: float
    api_gpu: int = 0
    """Leading blocks on the GPU before the hint, as the sidecar told clients: it learns of evictions late."""
    problem: str | None = None


class Steps:
    """Reads what the witness writes, while it is written."""

    def __init__(self, path: Path) -> None:
        self._tail = Tail(path)
        self._seen: list[Step] = []

    def seen(self) -> list[Step]:
        """All steps so far."""
        for line in self._tail.read():
            loads = tuple((kind, tuple(slots)) for kind, slots in line["loads"])
            self._seen.append(Step(line["at"], line["computes"], loads, tuple(map(tuple, line["saves"]))))
        return self._seen

    def since(self, at: int) -> list[Step]:
        return [step for step in self.seen()[-1000:] if step.at >= at]

    def last_before(self, at: int) -> int:
        return max((step.at for step in self.seen()[-1000:] if step.at < at), default=0)

    def wait_idle(self, seconds: float) -> None:
        """Returns when there has been no step for so long."""
        while (left := self.last_before(time.monotonic_ns()) / 1e9 + seconds - time.monotonic()) > 0:
            time.sleep(left)


class Hints:
    """Sends hints over one connection that stays open: an agent's harness does not connect anew for each."""

    def __init__(self, url: str) -> None:
        self._connection, _ = rest.open_connection(url, 30)
        self._sent = 0

    def send(self, verb: str, session: str) -> tuple[int, int, str]:
        """When it was sent, when it was answered (nanoseconds), and the outcome that a prefetch is answered with."""
        self._sent += 1
        if verb == "tool_end":
            path, body = f"/v1/sessions/{session}/tool_end", {}
        else:
            path, body = "/v1/hints", _envelope(f"hint-{self._sent}", verb, session)
        payload = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        if self._connection.sock is None:
            # The first time, and after an answer that closed it: connecting is not what is measured.
            self._connection.connect()
        sent = time.monotonic_ns()
        self._connection.request("POST", path, payload, headers)
        answer = self._connection.getresponse()
        text = answer.read()
        answered = time.monotonic_ns()
        if answer.status != 200:
            raise rest.HttpError("POST", path, answer.status, text.decode(errors="replace"))
        outcome = "accepted" if verb == "tool_end" else json.loads(text)["results"][0]["outcome"]
        return sent, answered, outcome

    def close(self) -> None:
        """The next hint connects anew."""
        self._connection.close()


def _envelope(message_id: str, verb: str, session: str) -> dict[str, Any]:
    action = {
        "action_id": "1",
        "action_type": verb,
        "action_version": "1.0",
        "payload": {"target": {"session_id": session}},
    }
    return {"protocol_version": "1.0", "message_id": message_id, "actions": [action]}


class Bench:
    """Rounds on one engine: sessions that are evicted together, then hints and empty steps in random order."""

    def __init__(self, rig: Rig, log: Steps, options: argparse.Namespace) -> None:
        self._rig = rig
        self._log = log
        self._idle_s = options.idle
        self._rng = random.Random(options.seed)
        self._hints = Hints(rig.sidecar.url)
        self._asks = {
            name: steps.agent(name, BLOCKS, options.seed, max_tokens=ANSWER_TOKENS)
            for name in (*(f"evicted-{number}" for number in range(EVICTED)), RESIDENT)
        }
        self._slots: dict[str, set[int]] = {}
        self._rounds = 0

    def close(self) -> None:
        self._hints.close()

    def first_turns(self) -> None:
        """Each session's KV goes into the arena, and the slots that were written meanwhile are that session's."""
        for name, ask in self._asks.items():
            began = time.monotonic_ns()
            steps.first_turn(self._rig, ask)
            written = [slots for step in self._log.since(began) for slots in step.saves]
            self._slots[name] = {slot for slots in written for slot in slots}
            assert len(self._slots[name]) == BLOCKS, f"{name} was saved into {self._slots[name]}"

    def round(self) -> list[Sample]:
        """`EVICTED` samples of each arm."""
        # A turn also ends what the hints of the round before have started: its session is expected no longer.
        for ask in self._asks.values():
            self._rig.vllm.ask(ask)
        self._rounds += 1
        steps.evict(self._rig, f"flood-{self._rounds}")
        self._rig.vllm.ask(self._asks[RESIDENT])
        evicted = [("hint", name) for name in self._asks if name != RESIDENT]
        events = [*evicted, *[("empty", RESIDENT)] * EVICTED]
        self._rng.shuffle(events)
        return [self._sample(arm, self._rng.choice(VERBS), session) for arm, session in events]

    def _sample(self, arm: str, verb: str, session: str) -> Sample:
        # Asked before the idle time: the question wakes the sidecar, and an engine without a step evicts nothing.
        gpu, host = self._where(session)
        self._log.wait_idle(self._idle_s + self._rng.uniform(0, JITTER_S))
        try:
            sent, answered, outcome = self._hints.send(verb, session)
        except (OSError, http.client.HTTPException, rest.HttpError) as error:
            self._hints.close()
            nan = float("nan")
            broken = f"the hint was not taken: {error!r}"
            return Sample(arm, verb, nan, nan, nan, nan, problem=broken)

        def begun() -> bool:
            return any(step.loads or arm == "empty" for step in self._log.since(sent))

        # If it never begins, the sample is invalid and says so.
        _wait(begun, STEP_WAIT_S)
        self._log.wait_idle(SETTLED_S)
        after = self._log.since(sent)
        ours = next((step.at for step in after if step.loads or arm == "empty"), None)
        made = Sample(
            arm=arm,
            verb=verb,
            step_ms=float("nan") if ours is None else (ours - sent) / 1e6,
            answer_ms=(answered - sent) / 1e6,
            idle_s=(sent - self._log.last_before(sent)) / 1e9,
            first_step_ms=(after[0].at - sent) / 1e6 if after else float("nan"),
            api_gpu=gpu,
        )
        found = problem(arm, after, self._slots[session], outcome)
        if host != BLOCKS:
            found = found or f"{host} of {BLOCKS} blocks were in the arena"
        if made.idle_s < self._idle_s:
            found = found or f"the engine was not idle: a step {made.idle_s:.3f} s before"
        if not _wait(lambda: self._where(session)[0] == BLOCKS, BACK_WAIT_S):
            found = found or f"{self._where(session)[0]} of {BLOCKS} blocks were on the GPU afterwards"
        return dataclasses.replace(made, problem=found)

    def _where(self, session: str) -> tuple[int, int]:
        """Leading blocks of the session on the GPU, and in the arena, as the sidecar knows."""
        known = self._rig.sidecar.session(session)
        return (0, 0) if known is None else (known["blocks"]["gpu"], known["blocks"]["host"])


def _wait(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Whether it came true in time."""
    try:
        wait_until("the engine", condition, timeout_s, poll_s=0.01)
    except TimeoutError:
        return False
    return True


def problem(arm: str, after: Sequence[Step], slots: set[int], outcome: str) -> str | None:
    """Why the sample is not what its arm says; None if it is. `after`: the steps since. `slots`: the session's own.

    A fetch takes what is missing on the GPU and nothing else. One that reads every slot of the session proves three
    things: the copy is the session's, all of it had been evicted, and nobody else's came first.
    """
    loads = [(kind, set(read)) for step in after for kind, read in step.loads]
    if outcome != "accepted":
        return f"the hint was answered with {outcome}"
    if any(step.computes for step in after):
        return "a request ran"
    if any(step.saves for step in after):
        return "something was saved meanwhile"
    if arm == "empty":
        if not after:
            return "the engine did not step"
        return f"something was copied: {loads}" if loads else None
    return None if loads == [("prefetch", slots)] else f"not one prefetch of slots {slots}, but {loads}"


def valid(samples: Sequence[Sample], arm: str, verb: str | None = None) -> list[Sample]:
    return [one for one in samples if one.arm == arm and verb in (None, one.verb) and one.problem is None]


def bars(samples: Sequence[Sample]) -> list[Bar]:
    times = [one.step_ms for one in valid(samples, "hint")]
    p50, p95 = percentile(times, 0.5), percentile(times, 0.95)
    return [
        Bar("hint to copy on an idle engine, P50 in ms", p50, P50_MAX_MS, p50 <= P50_MAX_MS),
        Bar("hint to copy on an idle engine, P95 in ms", p95, P95_MAX_MS, p95 <= P95_MAX_MS),
    ]


def reasons(samples: Sequence[Sample]) -> list[str]:
    """Why the run proves nothing; empty if it is valid."""
    found = []
    for arm in ARMS:
        count = len(valid(samples, arm))
        if count < SAMPLES_MIN:
            problems = sorted({one.problem for one in samples if one.arm == arm and one.problem})
            found.append(
                f"{arm}: {count} valid samples of {SAMPLES_MIN} wanted" + "".join(f"; {one}" for one in problems[:3])
            )
    return found


LABELS = {"hint": "hint → copy submitted", "empty": "the same hint, nothing to copy"}


def table(samples: Sequence[Sample]) -> str:
    """For people."""
    head = f"{'P50':>9} {'P95':>9} {'P99':>9} {'samples':>8} {'invalid':>8}"
    lines = [f"{'milliseconds since the hint was sent':<48} {head}"]

    def row(name: str, times: Sequence[float], invalid: int | None = None) -> None:
        cells = " ".join(f"{percentile(times, share):>9.3f}" for share in (0.5, 0.95, 0.99))
        lines.append(f"{name:<48} {cells} {len(times):>8} {'' if invalid is None else invalid:>8}")

    for arm in ARMS:
        for verb in (None, *VERBS):
            found = valid(samples, arm, verb)
            all_of = [one for one in samples if one.arm == arm and verb in (None, one.verb)]
            name = LABELS[arm] if verb is None else f"  {verb}"
            row(name, [one.step_ms for one in found], len(all_of) - len(found))
    for arm in ARMS:
        for verb in VERBS:
            row(f"sidecar's answer, {arm}, {verb}", [one.answer_ms for one in valid(samples, arm, verb)])
    ours = percentile([one.step_ms for one in valid(samples, "hint")], 0.5)
    empty = percentile([one.step_ms for one in valid(samples, "empty")], 0.5)
    lines.append(f"{'difference of the P50: finding and submitting':<48} {ours - empty:>9.3f}")
    first = [one for one in valid(samples, "hint") if one.first_step_ms != one.step_ms]
    if first:
        lines.append(f"{len(first)} hints woke the engine a step before the one that submits the copy")
    stale = sum(1 for one in valid(samples, "hint") if one.api_gpu)
    if stale:
        lines.append(f"{stale} sessions were evicted and the sidecar still told clients that they were on the GPU")
    return "\n".join(lines)


def summary(samples: Sequence[Sample]) -> dict[str, Any]:
    """The arms, for the JSON file."""
    arms: dict[str, Any] = {}
    for arm in ARMS:
        arms[arm] = {
            "step_ms": report.spread([one.step_ms for one in valid(samples, arm)]),
            "verbs": {
                verb: {
                    "step_ms": report.spread([one.step_ms for one in valid(samples, arm, verb)]),
                    "answer_ms": report.spread([one.answer_ms for one in valid(samples, arm, verb)]),
                }
                for verb in VERBS
            },
            "told_as_on_gpu_before": sum(1 for one in valid(samples, arm) if one.api_gpu),
            "invalid": [
                {"verb": one.verb, "problem": one.problem, "step_ms": report.rounded(one.step_ms)}
                for one in samples
                if one.arm == arm and one.problem
            ],
        }
    return arms


def measure(bench: Bench, wanted: int, seconds: float) -> list[Sample]:
    """Rounds until there are enough valid samples of both arms, or time is up."""
    samples: list[Sample] = []
    start = time.monotonic()
    rounds = -(-wanted // EVICTED)
    for number in range(rounds + EXTRA_ROUNDS):
        enough = min(len(valid(samples, arm)) for arm in ARMS) >= wanted
        if enough or time.monotonic() - start > seconds:
            break
        new = bench.round()
        samples += new
        if number % 5 == 0 or any(one.problem for one in new):
            line = " · ".join(
                f"{one.arm} {one.step_ms:.2f}" + (f" ({one.problem})" if one.problem else "") for one in new
            )
            say(f"  round {number + 1:>2} of {rounds}, {time.monotonic() - start:>3.0f} s, ms: {line}")
    return samples


def main(options: argparse.Namespace) -> int:
    began = time.monotonic()
    facts = report.facts(options.seed, WITNESSED.version)
    LOGS.mkdir(parents=True, exist_ok=True)
    STEPS_LOG.write_bytes(b"")
    say("Starting the sidecar and vLLM with Greenroom (half a minute; more on a busy machine) …")
    # A session finds its own KV in the arena, however busy the machine is: rounds stay short.
    with rig(WITNESSED, "256MiB", "hint-latency", lookup_wait_ms=10_000) as made:
        made.vllm.wait_ready(say)
        log = Steps(STEPS_LOG)
        bench = Bench(made, log, options)
        try:
            say(f"Rounds: {EVICTED} evicted sessions of {BLOCKS} blocks, a hint for each; as many empty steps.")
            bench.first_turns()
            samples = measure(bench, options.samples, options.seconds)
        finally:
            bench.close()
    content = {
        "arms": summary(samples),
        **facts,
        "workload": {
            "model": WITNESSED.model,
            "pool_blocks": POOL,
            "session_blocks": BLOCKS,
            "idle_s": options.idle,
        },
        "seconds": round(time.monotonic() - began, 1),
    }
    say("")
    say(table(samples))
    say("")
    return report.conclude(bars(samples), reasons(samples), content, options.json)
