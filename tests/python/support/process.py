"""A child process that cannot outlive the test run: own process group, log file, bounded waits."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

POLL_S = 0.05
"""How often a wait looks again at the thing it waits for."""

_live: weakref.WeakSet[Process] = weakref.WeakSet()


class ProcessFailed(RuntimeError):
    """A child ended, or did not get ready, when it should have; the message carries the end of its log."""


def free_port() -> int:
    """A TCP port of the loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(what: str, condition: Callable[[], bool], timeout_s: float, poll_s: float = POLL_S) -> None:
    """Returns as soon as `condition()` holds; raises `TimeoutError` naming `what` after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{what}: not within {timeout_s:g} s")
        time.sleep(poll_s)


@dataclasses.dataclass(frozen=True)
class Member:
    """One process of a child's group, as /proc shows it."""

    pid: int
    title: str
    cpu_s: float
    rss_anon_bytes: int
    stopped: bool
    """By a signal."""


class Process:
    """A command in a session of its own. Everything it starts dies with it, and with this interpreter."""

    def __init__(
        self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None, cwd: Path | None = None
    ) -> None:
        self.command = list(command)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._out = log.open("ab")
        self._popen = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=subprocess.STDOUT,
            env=None if env is None else dict(env),
            cwd=cwd,
            start_new_session=True,
        )
        _live.add(self)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def running(self) -> bool:
        return self._popen.poll() is None

    def returncode(self) -> int | None:
        return self._popen.poll()

    def wait(self, timeout_s: float) -> int:
        """The exit status; raises `subprocess.TimeoutExpired` when it has not ended in time."""
        return self._popen.wait(timeout_s)

    def signal(self, number: int) -> None:
        """To the leader only, as an operator's `kill` would."""
        if self.running():
            self._popen.send_signal(number)

    def signal_group(self, number: int) -> None:
        """To the child and everything it started."""
        if self.running():
            os.killpg(self.pid, number)

    def kill_group(self) -> None:
        """SIGKILL for the child and everything it started; returns when all of them are gone."""
        if self.members():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        if self.running():
            self._popen.wait(10)
        wait_until(f"the end of the processes of {Path(self.command[0]).name}", lambda: not self.members(), 10)
        self._out.close()
        _live.discard(self)

    def terminate(self, timeout_s: float = 30) -> int:
        """SIGTERM to the leader, then whatever is left of the group is killed. Returns the leader's exit status."""
        self.signal(signal.SIGTERM)
        try:
            status = self.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_group()
            raise ProcessFailed(
                f"{self.command[0]} did not obey SIGTERM within {timeout_s:g} s\n{self.log_tail()}"
            ) from None
        self.kill_group()
        return status

    def log_tail(self, lines: int = 40) -> str:
        """The last lines of the log, for messages."""
        text = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"--- {self.log} (last {lines} lines)", *text[-lines:]])

    def members(self) -> list[Member]:
        """The living processes of the group."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                member = _member(entry, self.pid)
                if member is not None:
                    found.append(member)
        return found


def _member(entry: Path, group: int) -> Member | None:
    """Reads one /proc entry; None when it is gone, a zombie or of another group."""
    try:
        stat = (entry / "stat").read_text()
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        fields = stat[stat.rindex(")") + 2 :].split()
        if int(fields[2]) != group or fields[0] in "ZX":
            return None
        title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip() or name
        status = (entry / "status").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError, ValueError):
        return None
    rss = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:")), 0)
    cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return Member(int(entry.name), title, cpu_s, rss, stopped=fields[0] in "Tt")


@atexit.register
def _kill_all() -> None:
    for process in list(_live):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
