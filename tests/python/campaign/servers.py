"""The engine and the sidecar of the campaign, and the handles by which they are hurt."""

from __future__ import annotations

import dataclasses
import mmap
import os
import resource
import struct
import subprocess
from pathlib import Path

from campaign.hook_times import HOOK_TIMES
from real_vllm.rigs import AUDITED, ONE_THREAD, PLAIN, PLAIN_TWO_RANKS, TWO_RANKS
from support.make_model import PRESETS, make_model
from support.paths import MODELS, ROOT
from support.process import Member, Process
from support.servers import Connector, Rig, Say, Sidecar, VllmConfig, silent, wait_ready

SITE = ROOT / "target" / "site-faults"
"""The wheel with fault points, unpacked."""
MODEL = MODELS / "campaign"
"""A folder of its own: its weights are changed."""
WEIGHTS, OTHER_WEIGHTS = 1, 2
"""Seeds; the first are those of `tiny`, whose answers plain vLLM gives."""
SLOW_COPIES = "host::copy::delay=25%sleep(60)"
"""A quarter of the copies take 60 ms more: long enough to be hit, and in no fixed order."""
LEASE_TTL = "5s"
"""Shorter than the longest stop."""
SESSIONS_MAX = 256
"""Remembered by its sidecar: so few that a long run sees that table full, and what grows then grows without end."""

FEW_KERNELS = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
"""oneDNN keeps a kernel for each size of a matrix product, up to 1,024: a worker without Greenroom grew by 730 MiB over
1,250 prompts of 627 lengths, and by 115 with 16 of them kept. A leak would not be seen beside that."""


def write_weights(seed: int) -> Path:
    """Puts these weights under the one path."""
    return make_model(MODEL, PRESETS["tiny"], seed)


def engine(ranks: int = 1) -> VllmConfig:
    """vLLM with Greenroom, watched and timed, its copies slow. The weights must have been written before it starts."""
    if not (SITE / "greenroom").exists():
        raise FileNotFoundError(f"{SITE} does not hold the build with fault points: run `make faults-wheel`")
    path = os.pathsep.join((str(SITE), dict(AUDITED.env)["PYTHONPATH"]))
    own = (
        ("PYTHONPATH", path),
        ("GREENROOM_FAULT", SLOW_COPIES),
        ("GREENROOM_HOOK_TIMES", str(HOOK_TIMES)),
        FEW_KERNELS,
    )
    return dataclasses.replace(
        AUDITED,
        model=str(MODEL),
        connector=Connector("CampaignConnector", "campaign.connector"),
        args=("--dtype", PRESETS["tiny"].dtype, *(TWO_RANKS if ranks > 1 else ())),
        env=AUDITED.env + own + (ONE_THREAD if ranks > 1 else ()),
    )


def plain(ranks: int = 1) -> VllmConfig:
    """vLLM whose answers are the right ones."""
    return PLAIN if ranks == 1 else PLAIN_TWO_RANKS


class Clock:
    """The wall clock of a process that was started with `environment`. Everything else keeps its own."""

    def __init__(self, folder: Path) -> None:
        self._step = folder / "clock"
        self._step.write_bytes(bytes(8))
        self._library = folder / "clock.so"
        source = Path(__file__).with_name("clock.c")
        command = ["gcc", "-shared", "-fPIC", "-O1", "-o", str(self._library), str(source)]
        subprocess.run(command, check=True, timeout=60)

    def environment(self) -> dict[str, str]:
        return {"LD_PRELOAD": str(self._library), "CAMPAIGN_CLOCK": str(self._step)}

    def set(self, seconds: int) -> None:
        """The clock is now off by so much, at once."""
        with self._step.open("r+b") as file, mmap.mmap(file.fileno(), 8) as shared:
            shared[:] = struct.pack("=q", seconds)


class Mortal(Sidecar):
    """The campaign's sidecar. `log_full`: the next one is started with its log on a full disk."""

    def __init__(self, memory: str = "1GiB") -> None:
        super().__init__(memory, ("--lease-ttl", LEASE_TTL, "--sessions-max", str(SESSIONS_MAX)), "mortal")
        self.clock = Clock(Path(self._folder.name))
        self.log_full = False

    def start(self, wait: Say = silent) -> None:
        command = ["/bin/sh", "-c", 'exec "$0" "$@" 2>/dev/full', *self._command] if self.log_full else self._command
        self.log_full = False
        self.process = Process(command, self.log, {**os.environ, **self.clock.environment()})
        wait_ready(self.process, self.url + "/healthz", 20, "the sidecar", wait)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def alive(self) -> bool:
        return self.process is not None and self.process.running()


def sidecar_of(rig: Rig) -> Mortal:
    assert isinstance(rig.sidecar, Mortal)
    return rig.sidecar


def members(rig: Rig, title: str) -> list[Member]:
    """vLLM's processes with this word in their title, in the order of their ranks."""
    assert rig.vllm.process is not None
    return sorted((one for one in rig.vllm.process.members() if title in one.title), key=lambda one: one.title)


def workers(rig: Rig) -> list[int]:
    return [one.pid for one in members(rig, "Worker")]


def scheduler(rig: Rig) -> int:
    (one,) = members(rig, "EngineCore")
    return one.pid


def descriptors(pid: int) -> list[int]:
    return [int(name) for name in os.listdir(f"/proc/{pid}/fd")]


def limit(pid: int, what: int, most: int) -> tuple[int, int]:
    """Sets a soft limit of another process; returns what was there."""
    before = resource.prlimit(pid, what)
    resource.prlimit(pid, what, (most, before[1]))
    return before


def is_stopped(pid: int) -> bool:
    """All of its threads, by a signal."""
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return False  # A thread has just ended: the others still run.
    return all(stat.rpartition(")")[2].split()[0] in "tT" for stat in stats)


def address_space(pid: int) -> int:
    """Bytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return pages * resource.getpagesize()
