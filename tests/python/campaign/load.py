"""Random sessions with tool hints, whose right answers are known before: the story of `real_vllm.script`, in laps."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from campaign.tally import Tally, Turn
from real_vllm import script
from real_vllm.harness import Told, envelope, on_plain
from real_vllm.script import Signal, Wave
from support.completions import Ask
from support.rest import HttpError, raw
from support.servers import Rig, Sidecar, VllmServer

REQUEST_S = 90.0
"""A request that says nothing for so long hangs."""
TELL_S = 0.3
"""What agents' hooks give a sidecar that does not answer."""

HINTS = {
    "prefetch": "kv.prefetch",
    "prefetch_twice": "kv.prefetch",
    "pin": "kv.pin",
    "unpin": "kv.unpin",
    "demote": "kv.demote",
}


class Load:
    """Tells the story wave by wave, again and again. What it sees goes into the tally."""

    def __init__(self, seed: int, turns: int, pool_blocks: int, tally: Tally) -> None:
        self._story = script.write(seed, turns, pool_blocks)
        self._told: list[list[Told]] = []
        self._tally = tally
        self._lock = threading.Lock()
        self._waves = itertools.count()
        self.vllm_killed = threading.Event()
        """Set before vLLM is killed: its requests fail from then on."""

    def learn(self, server: VllmServer) -> None:
        """Plain vLLM's answers."""
        self._told = on_plain(server, self._story)

    def play(self, rig: Rig, going: Callable[[int], bool]) -> None:
        """One wave after the other, for as long as `going` says of the number played."""
        played = 0
        while not self.vllm_killed.is_set() and going(played):
            lap, place = divmod(next(self._waves), len(self._story))
            self._wave(rig, self._story[place], self._told[place], lap)
            played += 1

    def _wave(self, rig: Rig, wave: Wave, told: list[Told], lap: int) -> None:
        for signal in wave.signals:
            self._tell(rig.sidecar, signal, lap)
        with ThreadPoolExecutor(len(told)) as pool:
            list(pool.map(lambda one: self._ask(rig, one, lap), told))

    def _ask(self, rig: Rig, one: Told, lap: int) -> None:
        turn, name = one.turn, f"{one.turn.name}-{lap}"
        ask = Ask(one.prompt, turn.max_tokens, session=turn.session, request_id=name)
        try:
            if turn.abort_after is not None:
                with rig.vllm.stream(ask, REQUEST_S) as stream:
                    for _ in stream if turn.abort_after else ():
                        if len(stream.tokens) >= turn.abort_after:
                            break
                with self._lock:
                    self._tally.aborted += 1
                return
            answer = rig.vllm.ask(ask, REQUEST_S)
        except (OSError, HttpError, http.client.HTTPException) as error:
            with self._lock:
                self._failed(name, error)
            return
        with self._lock:
            assert one.answer is not None
            self._tally.difference.add(name, one.answer, answer)
            now = time.monotonic()
            self._tally.turns.append(Turn(now, answer.ttft_s * 1e3, answer.cached_tokens, answer.prompt_tokens))

    def _failed(self, name: str, error: Exception) -> None:
        if isinstance(error, TimeoutError):
            self._tally.hung.append(f"{name}: nothing for {REQUEST_S:g} s")
        elif self.vllm_killed.is_set():
            self._tally.lost += 1
        else:
            self._tally.failed.append(f"{name}: {error!r}")

    def _tell(self, sidecar: Sidecar, signal: Signal, lap: int) -> None:
        """Whoever answers, and whatever: the sidecar may be dead, or a new one that knows nobody."""
        for method, path, body in calls(signal, lap):
            status = 0
            with contextlib.suppress(OSError):
                data = None if body is None else json.dumps(body).encode()
                status, _ = raw(method, sidecar.url + path, data, {"content-type": "application/json"}, TELL_S)
            self._tally.told[status] += 1


def calls(signal: Signal, lap: int) -> list[tuple[str, str, object]]:
    """What a harness sends: method, path and body of each call."""
    session = f"/v1/sessions/{signal.session}"
    if signal.call == "retire":
        return [("DELETE", session, None)]
    if signal.call in HINTS:
        hint = envelope(f"message-{signal.number}-{lap}", (HINTS[signal.call], signal.session))
        return [("POST", "/v1/hints", hint)] * (2 if signal.call == "prefetch_twice" else 1)
    events: dict[str, tuple[str, dict[str, object]]] = {
        "tool_start": ("tool_start", {"tool": "bash", "call_id": "call"}),
        "ask_person": ("tool_start", {"tool": "AskUserQuestion", "call_id": "question"}),
        "tool_end": ("tool_end", {"call_id": "call"}),
    }
    event, body = events[signal.call]
    if signal.call == "tool_start" and signal.number:
        body["eta_ms"] = signal.number
    return [("POST", f"{session}/{event}", body)]
