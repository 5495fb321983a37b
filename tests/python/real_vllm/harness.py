"""Acts a story out: on plain vLLM, to learn the right answers, and on vLLM with Greenroom, hints and all."""

from __future__ import annotations

import dataclasses
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from real_vllm.script import Signal, Turn, Wave
from support.completions import Ask, Completion
from support.rest import HttpError, raw
from support.servers import Rig, Sidecar, VllmServer

OUTCOMES = {"accepted", "clipped", "deferred", "rejected", "missing"}
NEAR_TIE = 1e-5
"""Two best tokens that are closer than this may change places by float noise."""
TURN_S = 180


def envelope(message_id: str, *actions: tuple[str, str]) -> dict[str, Any]:
    """A message of (action type, session)."""
    return {
        "protocol_version": "1.0",
        "message_id": message_id,
        "actions": [
            {
                "action_id": f"{message_id}/{number}",
                "action_type": kind,
                "action_version": "1.0",
                "payload": {"target": {"session_id": session}},
            }
            for number, (kind, session) in enumerate(actions)
        ],
    }


def hints(sidecar: Sidecar, message_id: str, *actions: tuple[str, str]) -> list[dict[str, Any]]:
    """Sends an envelope of (action type, session); the results, in the order of the actions."""
    answer = sidecar.post("/v1/hints", envelope(message_id, *actions))
    assert answer["message_id"] == message_id
    results: list[dict[str, Any]] = answer["results"]
    assert [result["action_id"] for result in results] == [f"{message_id}/{n}" for n in range(len(actions))]
    assert {result["outcome"] for result in results} <= OUTCOMES
    return results


class Harness:
    """Sends the signals of a story. Each method is a kind of signal."""

    def __init__(self, sidecar: Sidecar) -> None:
        self._sidecar = sidecar
        self.happened: Counter[str] = Counter()
        """Signals by name; hints and events also with what they were answered."""

    def send(self, signal: Signal) -> None:
        getattr(self, signal.call)(signal)
        self.happened[signal.call] += 1

    def tool_start(self, signal: Signal) -> None:
        eta = {"eta_ms": signal.number} if signal.number else {}
        self._event(signal, "tool_start", {"tool": "bash", "call_id": "call", **eta})

    def ask_person(self, signal: Signal) -> None:
        self._event(signal, "tool_start", {"tool": "AskUserQuestion", "call_id": "question"})

    def tool_end(self, signal: Signal) -> None:
        # A turn may have begun since, or the session is nobody's: then there is no such call.
        self._event(signal, "tool_end", {"call_id": "call"}, allowed=(200, 404, 409))

    def prefetch(self, signal: Signal) -> None:
        self._hint(signal, "kv.prefetch")

    def prefetch_twice(self, signal: Signal) -> None:
        first = self._hint(signal, "kv.prefetch")
        assert self._hint(signal, "kv.prefetch") == first, "a message that is sent again is answered alike"

    def pin(self, signal: Signal) -> None:
        self._hint(signal, "kv.pin")

    def unpin(self, signal: Signal) -> None:
        self._hint(signal, "kv.unpin")

    def demote(self, signal: Signal) -> None:
        self._hint(signal, "kv.demote")

    def retire(self, signal: Signal) -> None:
        status, body = raw("DELETE", f"{self._sidecar.url}/v1/sessions/{signal.session}")
        assert status == 200, body

    def _hint(self, signal: Signal, kind: str) -> dict[str, Any]:
        (result,) = hints(self._sidecar, f"message-{signal.number}", (kind, signal.session))
        outcome = result["outcome"]
        assert outcome != "rejected", result
        if signal.session.startswith("nobody"):
            assert outcome == "missing", result
        self.happened[f"{kind} {outcome}"] += 1
        return result

    def _event(self, signal: Signal, event: str, body: dict[str, Any], allowed: tuple[int, ...] = (200,)) -> None:
        status = 200
        try:
            self._sidecar.post(f"/v1/sessions/{signal.session}/{event}", body)
        except HttpError as error:
            status = error.status
            if status not in allowed:
                raise
        self.happened[f"{event} {status}"] += 1


@dataclasses.dataclass(frozen=True)
class Told:
    """A turn with its whole prompt and, if its client stayed, plain vLLM's answer."""

    turn: Turn
    prompt: tuple[int, ...]
    answer: Completion | None


def on_plain(server: VllmServer, story: list[Wave]) -> list[list[Told]]:
    """Plain vLLM's answers, wave by wave; they become part of the prompts that follow."""
    history: dict[str, tuple[int, ...]] = {}
    told = []
    for wave in story:
        prompts = [history.get(turn.session, ()) + turn.new for turn in wave.turns]
        stay = [index for index, turn in enumerate(wave.turns) if turn.abort_after is None]
        with ThreadPoolExecutor(len(wave.turns)) as pool:
            asks = [Ask(prompts[index], wave.turns[index].max_tokens, logprobs=2) for index in stay]
            answers = dict(zip(stay, pool.map(lambda ask: server.ask(ask, TURN_S), asks), strict=True))
        for index, answer in answers.items():
            turn, tokens = wave.turns[index], (*prompts[index], *answer.tokens)
            if turn.keeps != "nothing":
                history[turn.session] = tokens if turn.keeps == "all" else prompts[index]
        told.append([Told(turn, prompts[index], answers.get(index)) for index, turn in enumerate(wave.turns)])
    return told


def on_greenroom(rig: Rig, story: list[Wave], told: list[list[Told]], harness: Harness) -> dict[str, Completion]:
    """The same prompts, with all that the harness says; the answers by the names of their turns."""
    answers: dict[str, Completion] = {}

    def ask(one: Told) -> None:
        turn = one.turn
        request = Ask(one.prompt, turn.max_tokens, session=turn.session, request_id=turn.name)
        if turn.abort_after is None:
            answers[turn.name] = rig.vllm.ask(request, TURN_S)
            return
        with rig.vllm.stream(request, TURN_S) as stream:
            for _ in stream if turn.abort_after else ():
                if len(stream.tokens) >= turn.abort_after:
                    break

    for wave, ones in zip(story, told, strict=True):
        for signal in wave.signals:
            harness.send(signal)
        with ThreadPoolExecutor(len(ones)) as pool:
            list(pool.map(ask, ones))
    return answers


@dataclasses.dataclass
class Difference:
    """What answers differ in. `tokens` were compared: all up to the first that is another one."""

    tokens: int = 0
    near_ties: list[str] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, plain: Completion, ours: Completion) -> None:
        """After a first other token the rest answers another text."""
        if len(plain.tokens) != len(ours.tokens):
            self.wrong.append(f"{name}: {len(ours.tokens)} tokens instead of {len(plain.tokens)}")
        margins = plain.margins()
        for position, (right, got) in enumerate(zip(plain.tokens, ours.tokens, strict=False)):
            self.tokens += 1
            if right != got:
                margin = margins[position]
                line = f"{name}, token {position}: {got} instead of {right}, plain vLLM's margin is {margin:.2e}"
                (self.near_ties if margin < NEAR_TIE else self.wrong).append(line)
                return

    def check(self) -> None:
        """Asserts that there is nothing but float noise, and little of that."""
        assert not self.wrong, "\n".join(self.wrong)
        assert len(self.near_ties) <= self.tokens // 1000, "\n".join(self.near_ties)
