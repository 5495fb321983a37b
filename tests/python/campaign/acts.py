"""What is done to the processes; the names are those of `plan`."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator

from campaign.plan import Act
from campaign.servers import Mortal, address_space, descriptors, is_stopped, limit, scheduler, sidecar_of, workers
from campaign.tally import Tally
from real_vllm import steps
from real_vllm.audit import Follower
from support.process import wait_until
from support.rest import is_up, raw
from support.servers import Rig

HEALTHY_S = 20.0
"""A sidecar that has what it needs again answers within this time."""
EXITED_S = 20.0
"""A killed worker is gone, and the sidecar knows it."""
MID_COPY_S = 10.0
"""How long a copy is waited for, in which requests that have been sent go on."""
BETWEEN_STOPS_S = 0.05
CLIENTS = 32
MEMORY_LEFT = 1 << 20
"""Bytes that an exhausted sidecar may still take."""
BODIES = 24
BODY_HASHES = 30_000
"""Hashes of one message: its body is nearly as long as the sidecar allows."""


class Acts:
    """Each method returns when it is done; what has to be mended then is the caller's business."""

    def __init__(self, rig: Rig, tally: Tally, witness: Follower) -> None:
        self._rig = rig
        self._tally = tally
        self._witness = witness

    @property
    def _sidecar(self) -> Mortal:
        return sidecar_of(self._rig)

    def do(self, act: Act) -> None:
        getattr(self, act.name)(act)

    def slots(self, *states: str) -> int:
        host = self._sidecar.get("/v1/status")["tiers"]["host"]
        return sum(int(host[f"slots_{state}"]) for state in states)

    def _start_sidecar(self) -> None:
        self._sidecar.start()
        self._tally.sidecar_starts += 1

    # The sidecar

    def kill_sidecar(self, act: Act) -> None:
        self._sidecar.kill()
        self._start_sidecar()

    def kill_sidecar_late(self, act: Act) -> None:
        self._sidecar.kill()
        time.sleep(act.seconds)
        self._start_sidecar()

    def kill_sidecar_twice(self, act: Act) -> None:
        """Again as soon as the engine has found it."""
        self.kill_sidecar(act)
        steps.wait_connected(self._sidecar, len(workers(self._rig)))
        self.kill_sidecar(act)

    def stop_sidecar(self, act: Act) -> None:
        with stopped(self._sidecar.pid):
            time.sleep(act.seconds)

    def stop_and_kill_sidecar(self, act: Act) -> None:
        os.kill(self._sidecar.pid, signal.SIGSTOP)
        time.sleep(act.seconds)
        self.kill_sidecar(act)

    def end_sidecar(self, act: Act) -> None:
        """As an operator does."""
        status = self._sidecar.stop()
        if status != 0:
            self._tally.problems.append(f"{act}: a sidecar told to end ended with {status}")
        self._start_sidecar()

    def exhaust_descriptors(self, act: Act) -> None:
        """By clients that connect and say nothing, up to a limit that is near."""
        pid = self._sidecar.pid
        before = limit(pid, resource.RLIMIT_NOFILE, max(descriptors(pid)) + CLIENTS // 2)
        with contextlib.ExitStack() as stack:
            stack.callback(resource.prlimit, pid, resource.RLIMIT_NOFILE, before)
            for _ in range(CLIENTS):
                stack.enter_context(socket.create_connection(("127.0.0.1", self._sidecar.port), 5))
            if is_up(self._sidecar.url + "/healthz"):
                self._tally.problems.append(f"{act}: it took a connection with no descriptor left")
            time.sleep(act.seconds)
        self._healthy(act)

    def exhaust_memory(self, act: Act) -> None:
        """It may die of it, like any process; then it is started again."""
        pid, url = self._sidecar.pid, self._sidecar.url
        before = limit(pid, resource.RLIMIT_AS, address_space(pid) + MEMORY_LEFT)
        for number in range(BODIES):
            with contextlib.suppress(OSError):
                raw("POST", url + "/v1/hints", _large_hint(number), {"content-type": "application/json"}, 5)
            if not self._sidecar.alive():
                self._tally.died_of_memory += 1
                self.kill_sidecar(act)
                return
        resource.prlimit(pid, resource.RLIMIT_AS, before)
        self._healthy(act)

    def fill_log(self, act: Act) -> None:
        """The next sidecar writes its log to a full disk; so does every line of its service."""
        self._sidecar.log_full = True
        self.kill_sidecar(act)

    def step_clock(self, act: Act) -> None:
        for step in act.clock_steps:
            self._sidecar.clock.set(step)
            time.sleep(act.seconds / len(act.clock_steps))
        self._sidecar.clock.set(0)
        self._healthy(act)

    def _healthy(self, act: Act) -> None:
        try:
            wait_until("health", lambda: is_up(self._sidecar.url + "/healthz"), HEALTHY_S)
        except TimeoutError:
            self._tally.problems.append(f"{act}: the sidecar was not healthy {HEALTHY_S:g} s afterwards")
            self.kill_sidecar(act)

    # vLLM, which survives

    def stop_worker(self, act: Act) -> None:
        with stopped(self._worker(act)):
            time.sleep(act.seconds)

    def stop_scheduler(self, act: Act) -> None:
        with stopped(scheduler(self._rig)):
            time.sleep(act.seconds)

    def stop_worker_kill_sidecar(self, act: Act) -> None:
        with stopped(self._worker(act)):
            self.kill_sidecar(act)
            time.sleep(act.seconds)

    def _worker(self, act: Act) -> int:
        pids = workers(self._rig)
        return pids[act.rank % len(pids)]

    # vLLM, which does not

    def kill_scheduler(self, act: Act) -> None:
        os.kill(scheduler(self._rig), signal.SIGKILL)

    def kill_worker(self, act: Act) -> None:
        os.kill(self._worker(act), signal.SIGKILL)

    def kill_scheduler_then_worker(self, act: Act) -> None:
        first, then = scheduler(self._rig), self._worker(act)
        _kill(first, then)

    def kill_worker_then_scheduler(self, act: Act) -> None:
        first, then = self._worker(act), scheduler(self._rig)
        _kill(first, then)

    def stop_worker_kill_scheduler(self, act: Act) -> None:
        """A stopped worker could still copy: until it is gone, the slots of its copies belong to nobody else."""
        worker, core = self._worker(act), scheduler(self._rig)
        copied = self._stop_mid_copy(worker, core)
        os.kill(core, signal.SIGKILL)
        wait_until("the engine's leave", lambda: not self._sidecar.get("/v1/status")["engines"], EXITED_S)
        time.sleep(act.seconds)
        kept = self.slots("leased", "draining")
        # Of a worker that somebody else has ended meanwhile nothing is proved.
        if copied and is_stopped(worker):
            self._tally.outlived += 1
            if kept < len(copied):
                self._tally.problems.append(f"{act}: {kept} slots are kept, and the worker may copy {len(copied)}")
        _kill(worker)

    def _stop_mid_copy(self, *pids: int) -> set[int]:
        """Stops an engine while it copies. The slots of its copies, which are none if it did not copy for so long."""
        deadline = time.monotonic() + MID_COPY_S
        while True:
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            wait_until("the stop", lambda: all(map(is_stopped, pids)), EXITED_S, poll_s=0.001)
            copied = self._witness.audit().copied(int(self._sidecar.get("/v1/status")["boot_id"], 16))
            if copied or time.monotonic() > deadline:
                return copied
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
            time.sleep(BETWEEN_STOPS_S)

    def kill_scheduler_and_sidecar(self, act: Act) -> None:
        os.kill(scheduler(self._rig), signal.SIGKILL)
        self.kill_sidecar(act)

    def kill_all(self, act: Act) -> None:
        self._rig.vllm.kill()


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stops a process for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _kill(*pids: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _large_hint(number: int) -> bytes:
    """A message that the sidecar must keep whole while it reads it."""
    hashes = [f"{number:032x}{index:032x}" for index in range(BODY_HASHES)]
    action = {
        "action_id": "1",
        "action_type": "kv.prefetch",
        "action_version": "1.0",
        "payload": {"target": {"block_hashes": hashes}},
    }
    return json.dumps({"protocol_version": "1.0", "message_id": f"large-{number}", "actions": [action]}).encode()
