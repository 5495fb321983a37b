"""Greenroom's figures in vLLM's own log and ``/metrics``.

The scheduler's side hands its totals over as differences; vLLM carries them to its front end as plain data, where the
counters and gauges below are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from greenroom.vllm.compat import KVConnectorPromMetrics, KVConnectorStats, prometheus_kinds

COUNTERS = {
    "demand_blocks": "KV blocks that requests loaded from Greenroom's host memory.",
    "prefetch_blocks": "KV blocks that were brought back to the GPU before their request.",
    "prefetch_used": "Blocks brought back ahead that a request then used.",
    "saved_blocks": "KV blocks saved to Greenroom's host memory.",
    "fenced": "Copies that had to end before their blocks could be reused.",
    "timeouts": "Lookups that the sidecar did not answer in time; they counted as misses.",
    "failed": "Copies that failed; their blocks were recomputed or not saved.",
}
GAUGES = {
    "waiting": "Sessions of this engine that wait for a tool or a person.",
    "ready": "1 while a sidecar is connected and every worker has its memory.",
}
PREFIX = "vllm:greenroom_"


class GreenroomStats(KVConnectorStats):  # type: ignore[misc]
    """One interval: ``data`` maps a figure's name to its increase (counters) or its value (gauges)."""

    data: dict[str, int]

    @classmethod
    def between(cls, before: Mapping[str, int], now: Mapping[str, int]) -> GreenroomStats | None:
        """What changed; None if nothing did."""
        data = {name: now[name] - before.get(name, 0) for name in COUNTERS if now[name] != before.get(name, 0)}
        data |= {name: now[name] for name in GAUGES if now[name] != before.get(name)}
        return cls(data=data) if data else None

    def reset(self) -> None:
        """Starts a new interval."""
        self.data = {}

    def aggregate(self, other: Any) -> GreenroomStats:
        """Adds a later interval to this one."""
        for name, value in other.data.items():
            self.data[name] = value if name in GAUGES else self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """For vLLM's log."""
        return {f"greenroom_{name}": value for name, value in self.data.items()}

    def is_empty(self) -> bool:
        """Whether there is nothing to say."""
        return not self.data


class GreenroomPromMetrics(KVConnectorPromMetrics):  # type: ignore[misc]
    """The Prometheus side; lives in vLLM's front end."""

    def __init__(self, vllm_config: Any, metric_types: Any, labels: list[str], values: dict[int, list[object]]) -> None:
        super().__init__(vllm_config, metric_types, labels, values)
        counter, gauge = (metric_types[kind] for kind in prometheus_kinds())
        self._metrics = {
            name: counter(name=PREFIX + name, documentation=text, labelnames=labels) for name, text in COUNTERS.items()
        }
        self._metrics |= {
            name: gauge(name=PREFIX + name, documentation=text, labelnames=labels, multiprocess_mode="mostrecent")
            for name, text in GAUGES.items()
        }
        self._engines = values
        for engine in values:
            self.observe(dict.fromkeys((*COUNTERS, *GAUGES), 0), engine)

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Takes one interval in."""
        for name, value in transfer_stats_data.items():
            metric = self._metrics[name].labels(*self._engines[engine_idx])
            if name in GAUGES:
                metric.set(value)
            else:
                metric.inc(value)
