"""Swap traffic without compute: two groups of waiting sessions that push each other out of the pool, in turns.

In a process of its own: the one that measures must not have to do anything for it.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from typing import Any

from support import rest
from support.process import wait_until

BACK_S = 20
POLL_S = 0.01
PAUSE_S = 0.005
TOOL = {"tool": "make", "eta_ms": 600_000}
"""Expected much later than whoever is due: its blocks may be taken."""

Groups = tuple[Sequence[str], Sequence[str]]


def call(url: str, session: str, event: str, body: dict[str, Any]) -> None:
    rest.call("POST", f"{url}/v1/sessions/{session}/{event}", body)


def is_back(url: str, session: str) -> bool:
    return bool(rest.call("GET", f"{url}/v1/sessions/{session}")["state"] == "ready")


def bring_back(url: str, group: Sequence[str]) -> None:
    """The group's tools end."""
    for session in group:
        call(url, session, "tool_end", {})


def wait_back(url: str, group: Sequence[str]) -> None:
    wait_until(f"{', '.join(group)} back on the GPU", lambda: all(is_back(url, one) for one in group), BACK_S, POLL_S)


def send_waiting(url: str, group: Sequence[str]) -> None:
    """The group's tools run, for a long time."""
    for session in group:
        call(url, session, "tool_start", TOOL)


def work(url: str, groups: Groups, on: Any, idle: Any, swaps: Any) -> None:
    """While `on` is set, one group after the other is brought back. `idle` is set while nothing is on its way."""
    turn = 0
    while True:
        if not on.is_set():
            idle.set()
            on.wait()
        group = groups[turn % 2]
        bring_back(url, group)
        wait_back(url, group)
        send_waiting(url, group)
        turn += 1
        swaps.value += 1
        time.sleep(PAUSE_S)


class Swapper:
    """The process, idle at first. All sessions must be in the arena and wait for a tool."""

    def __init__(self, url: str, groups: Groups) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._on, self._idle = spawn.Event(), spawn.Event()
        self._swaps = spawn.Value("i", 0)
        self._process = spawn.Process(target=work, args=(url, groups, self._on, self._idle, self._swaps), daemon=True)

    def __enter__(self) -> Swapper:
        self._process.start()
        try:
            self._wait_idle()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    def start(self) -> None:
        self._idle.clear()
        self._on.set()

    def stop(self) -> None:
        """Returns when the group that is on its way has arrived."""
        self._on.clear()
        self._wait_idle()

    def swaps(self) -> int:
        """Groups that were brought back so far."""
        return int(self._swaps.value)

    def _wait_idle(self) -> None:
        wait_until("the end of the swaps", lambda: self._idle.is_set() or not self._process.is_alive(), 2 * BACK_S)
        assert self._process.is_alive(), "the swaps broke off; why stands above"
