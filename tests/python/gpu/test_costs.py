"""What it costs those that decode that others are swapped beside them, and what it costs in device memory."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

from demo.stats import percentile
from gpu import moves, swaps
from gpu.pair import Pair, Record
from support import nvidia
from support.completions import Stream
from support.flood import prompt
from support.process import Process, wait_until
from support.rest import HttpError

PERIODS = 6
"""Of each kind."""
SETTLED_S = 0.3
"""Between periods: what the one before has started has ended."""
REPORTED_S = 1.5
"""An engine reports its figures at most once a second."""
RATIO_MAX = 1.05
GAPS_MIN = 100
QUIET_SHARE = 0.1
"""Of the bytes of the periods with swaps: those without are not free of any, for where there is room Greenroom brings
sessions back that wait for long."""


class Reader(threading.Thread):
    """Reads one stream until it is told to stop; notes when tokens arrive."""

    def __init__(self, stream: Stream) -> None:
        super().__init__(daemon=True)
        self._stream = stream
        self._over = threading.Event()
        self.failed: Exception | None = None

    def run(self) -> None:
        try:
            for _ in self._stream:
                if self._over.is_set():
                    return
        except (OSError, HttpError) as error:
            self.failed = error

    def begun(self) -> bool:
        return bool(self._stream.arrivals) or not self.is_alive()

    def end(self) -> None:
        self._over.set()
        self.join(moves.WAIT_S)
        assert not self.is_alive(), "the stream does not end"
        assert self.failed is None, f"the stream broke off: {self.failed!r}"

    def gaps(self, start: float, end: float) -> list[float]:
        """Milliseconds between tokens that both arrived within this time."""
        within = [at for at in self._stream.arrivals if start <= at <= end]
        return [(b - a) * 1e3 for a, b in itertools.pairwise(within)]


def period(pair: Pair, swapper: swaps.Swapper | None) -> tuple[list[float], float]:
    """Gaps between the tokens of all streams while they decode together, and seconds of it."""
    sizes = pair.sizes
    names = [f"stream-{number}" for number in range(sizes.streams)]
    limit = sizes.config.max_model_len - sizes.stream_tokens - 1
    opened = [pair.rig.vllm.stream(moves.ask(one, prompt(one, sizes.stream_tokens), limit)) for one in names]
    readers = [Reader(stream) for stream in opened]
    try:
        for reader in readers:
            reader.start()
        wait_until("the streams' first tokens", lambda: all(one.begun() for one in readers), moves.WAIT_S)
        if swapper is not None:
            swapper.start()
        time.sleep(SETTLED_S)
        start = time.perf_counter()
        time.sleep(sizes.period_s)
        end = time.perf_counter()
        for reader in readers:
            reader.end()
        if swapper is not None:
            swapper.stop()
    finally:
        for stream in opened:
            # vLLM aborts what nobody reads.
            stream.__exit__()
    time.sleep(SETTLED_S)
    return [gap for reader in readers for gap in reader.gaps(start, end)], end - start


def fetched(pair: Pair) -> float:
    """Bytes that came back ahead of requests, as far as the engine has told."""
    time.sleep(REPORTED_S)
    return pair.rig.sidecar.metrics().sum("greenroom_copy_bytes_total", direction="h2d", kind="prefetch")


def times(gaps: list[float]) -> dict[str, Any]:
    return {
        "p50_ms": round(percentile(gaps, 0.5), 3),
        "p99_ms": round(percentile(gaps, 0.99), 3),
        "max_ms": round(max(gaps), 3),
        "gaps": len(gaps),
    }


def test_decoding_goes_on_beside_swaps(pair: Pair, groups: swaps.Groups, record: Record) -> None:
    """Times are reported and not judged here: the machine may have other things to do."""
    gaps: dict[bool, list[float]] = {True: [], False: []}
    each: dict[bool, list[float]] = {True: [], False: []}
    period(pair, None)
    preempted = pair.rig.vllm.preemptions()
    with swaps.Swapper(pair.rig.sidecar.url, groups) as swapper:
        before, traffic_s = fetched(pair), 0.0
        moved = {True: 0.0, False: 0.0}
        for number in range(2 * PERIODS):
            # Which one comes first alternates, too.
            traffic = number % 4 in (1, 2)
            made, seconds = period(pair, swapper if traffic else None)
            assert len(made) >= GAPS_MIN, f"{len(made)} tokens in {seconds:.1f} s"
            gaps[traffic] += made
            each[traffic].append(round(percentile(made, 0.99), 3))
            # The swaps run a little longer than what is measured.
            traffic_s += (seconds + SETTLED_S) * traffic
            now = fetched(pair)
            moved[traffic] += now - before
            before = now
        swapped = swapper.swaps()
    p50, p99 = (percentile(gaps[True], share) / percentile(gaps[False], share) for share in (0.5, 0.99))
    rate = moved[True] / traffic_s
    record(
        itl={
            "streams": pair.sizes.streams,
            "with_swaps": {**times(gaps[True]), "p99_ms_by_period": each[True]},
            "without_swaps": {**times(gaps[False]), "p99_ms_by_period": each[False]},
            "p50_ratio": round(p50, 4),
            "p99_ratio": round(p99, 4),
            "bytes": int(moved[True]),
            "bytes_without": int(moved[False]),
            "gb_per_s": round(rate / 1e9, 2),
            "swaps": swapped,
            "preemptions": pair.rig.vllm.preemptions() - preempted,
            "bar": f"P99 with swaps ≤ {RATIO_MAX} × without: {'met' if p99 <= RATIO_MAX else 'NOT met'}",
        }
    )
    quiet = moved[False] / moved[True]
    assert quiet <= QUIET_SHARE, f"without swaps {quiet:.3f} of the bytes came back that came back with them"
    assert rate >= pair.sizes.traffic_min, f"{rate / 1e9:.3f} GB/s is no traffic"


def pids(process: Process | None) -> set[int]:
    assert process is not None
    return {member.pid for member in process.members()}


def test_device_memory(pair: Pair, record: Record) -> None:
    """Reported; where `nvidia-smi` does not tell memory by process, as null.

    Both have computed the same large batches by then: what those need stays allocated.
    """
    for server in (pair.plain, pair.rig.vllm):
        moves.take_pool(server, pair.sizes)
    plain, ours = (nvidia.memory_mib(pids(server.process)) for server in (pair.plain, pair.rig.vllm))
    beyond = None if plain is None or ours is None else ours - plain
    record(vram_mib={"plain": plain, "greenroom": ours, "beyond": beyond})
    assert pair.sizes.config.cuda is None or nvidia.ask("--query-gpu=memory.used"), "nvidia-smi does not answer"
