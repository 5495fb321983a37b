"""A random but repeatable story: interleaved sessions, what their harness says about them, who hangs up.

Nothing in it depends on what a server answers, but for the outputs that become part of the next prompt: those are plain
vLLM's on every server.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Literal

from support.flood import HIGHEST_TOKEN, LOWEST_TOKEN
from support.make_model import PRESETS

BLOCK = 32
SESSIONS = 20
"""Sessions at a time; one whose prompt gets too long ends, and another begins."""
SQUEEZERS = 8
"""Sessions that together do not fit: see `squeeze`."""
SHARED_PREFIXES = 2
SHARED_TOKENS = 9 * BLOCK + 5
PROMPT_MAX = 1700
WAVE_MAX = 4
ABORT_SHARE = 0.1
RETIRE_EVERY = 2
"""One in so many of the sessions that end says so, the first one too."""
SQUEEZE_SHARE = 0.6
"""Of the pool, for their prompts: they are admitted together, although they do not come at the same moment."""
SQUEEZE_EVERY = 20
"""Waves from one squeeze to the next."""

assert PRESETS["tiny"].vocab > HIGHEST_TOKEN

Keeps = Literal["all", "prompt", "nothing"]
"""What of a turn becomes history: prompt and answer, the prompt only, neither."""


@dataclasses.dataclass(frozen=True)
class Signal:
    """What a harness says. `call` names a method of `Harness`."""

    call: str
    session: str
    number: int = 0
    """Milliseconds of an estimate, or what makes a message id unique."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """A request: what was said before, and `new` tokens."""

    name: str
    session: str
    first: bool
    new: tuple[int, ...]
    max_tokens: int
    abort_after: int | None = None
    """Its client hangs up after this many tokens."""
    keeps: Keeps = "all"


@dataclasses.dataclass
class Wave:
    """Requests that run at the same time, after these signals have been sent one by one."""

    turns: list[Turn]
    signals: list[Signal] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Session:
    name: str
    tokens: int = 0
    retry: tuple[int, ...] | None = None
    last_wave: int = -1


class _Author:
    def __init__(self, seed: int, pool_blocks: int) -> None:
        self.rng = random.Random(seed)
        self.waves: list[Wave] = []
        self._pool_blocks = pool_blocks
        self._shared = [self._tokens(SHARED_TOKENS) for _ in range(SHARED_PREFIXES)]
        self._sessions = [_Session(f"agent-{n}") for n in range(SESSIONS)]
        self._squeezers = [_Session(f"squeezer-{n}") for n in range(SQUEEZERS)]
        self._born = SESSIONS
        self._turns = 0

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self.rng.randint(LOWEST_TOKEN, HIGHEST_TOKEN) for _ in range(count))

    def _turn(self, session: _Session, new: tuple[int, ...], max_tokens: int, abort_after: int | None = None) -> Turn:
        self._turns += 1
        turn = Turn(f"turn{self._turns}", session.name, session.tokens == 0, new, max_tokens, abort_after)
        if abort_after is None:
            session.tokens += len(new) + max_tokens
            session.retry = None
        else:
            session.retry = new
        return turn

    def _next_turn(self, session: _Session) -> Turn:
        if session.retry is not None:
            new = session.retry
        elif session.tokens == 0:
            new = self._tokens(self.rng.randint(200, 900))
            if self.rng.random() < 0.5:
                new = self.rng.choice(self._shared) + new
        else:
            new = self._tokens(self.rng.randint(1, 120))
        max_tokens = self.rng.randint(1, 48)
        if session.retry is None and self.rng.random() < ABORT_SHARE:
            return self._turn(session, new, 64, abort_after=self.rng.choice((0, 0, 1, 5, 20)))
        return self._turn(session, new, max_tokens)

    def wave(self) -> None:
        """A few sessions whose last turn was a while ago."""
        number = len(self.waves)
        rested = sorted(self._sessions, key=lambda session: session.last_wave)[: SESSIONS * 2 // 3]
        chosen = self.rng.sample(rested, self.rng.randint(1, WAVE_MAX))
        wave = Wave([])
        for session in chosen:
            if session.tokens > PROMPT_MAX - 200:
                if (self._born - SESSIONS) % RETIRE_EVERY == 0:
                    wave.signals.append(Signal("retire", session.name))
                self._sessions.remove(session)
                session = _Session(f"agent-{self._born}")
                self._born += 1
                self._sessions.append(session)
            wave.turns.append(self._next_turn(session))
            session.last_wave = number
        self.waves.append(wave)

    def squeeze(self) -> None:
        """Prompts that fit into the pool together, and longer answers that do not: vLLM has to preempt.

        The answers take seconds, for on a busy machine as much may pass until the last of them has begun.
        """
        blocks = int(self._pool_blocks * SQUEEZE_SHARE) // SQUEEZERS
        tokens = blocks * BLOCK - 16
        wave = Wave([])
        for session in self._squeezers:
            # Its history stays what it began with: the prompt does not grow.
            first = session.tokens == 0
            new = self._tokens(tokens - 3 * BLOCK if first else 3 * BLOCK)
            turn = self._turn(session, new, blocks * BLOCK * 5 // 2)
            wave.turns.append(dataclasses.replace(turn, keeps="prompt" if first else "nothing"))
        self.waves.append(wave)

    def signals(self) -> None:
        """Between two turns of a session its harness may say all sorts of things."""
        seen: dict[str, int] = {}
        for number, wave in enumerate(self.waves):
            for turn in wave.turns:
                if turn.session in seen:
                    for at, signal in self._between(turn.session, seen[turn.session] + 1, number):
                        self.waves[at].signals.append(signal)
                seen[turn.session] = number
        for wave in self.waves:
            self.rng.shuffle(wave.signals)

    def _between(self, session: str, start: int, end: int) -> Iterator[tuple[int, Signal]]:
        """Signals for the waves from `start` to `end`, before each."""
        some = self.rng.randint(start, end)
        kind = self.rng.choice(("none", "right", "right", "eta", "repeated", "cancelled", "wrong", "pinned", "person"))
        salt = self.rng.randrange(1 << 30)
        if kind in ("right", "repeated", "eta"):
            yield start, Signal("tool_start", session, self.rng.choice((0, 100, 60_000)) if kind == "eta" else 0)
            if kind == "repeated":
                yield some, Signal("tool_start", session)
                yield some, Signal("prefetch_twice", session, salt)
            yield max(some, end - 1, start + (end > start)), Signal("tool_end", session)
        elif kind == "cancelled":
            yield start, Signal("tool_start", session)
            yield some, Signal("prefetch", session, salt)
            yield some, Signal("demote", session, salt + 1)
        elif kind == "wrong":
            yield some, Signal("prefetch", f"nobody-{salt}", salt)
            yield some, Signal("tool_end", f"nobody-{salt}")
            yield start, Signal("prefetch", session, salt + 1)
        elif kind == "pinned":
            yield start, Signal("pin", session, salt)
            yield end, Signal("unpin", session, salt + 1)
        elif kind == "person":
            yield start, Signal("ask_person", session)


def write(seed: int, turns: int, pool_blocks: int) -> list[Wave]:
    """A story with at least so many turns that are not broken off."""
    author = _Author(seed, pool_blocks)
    while sum(turn.abort_after is None for wave in author.waves for turn in wave.turns) < turns:
        if len(author.waves) % SQUEEZE_EVERY == SQUEEZE_EVERY - 1:
            author.squeeze()
        else:
            author.wave()
    author.signals()
    return author.waves
