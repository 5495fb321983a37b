"""What travels between the two halves of the connector, through vLLM. Plans and reports are opaque bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

from greenroom.vllm.compat import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass
class StepMetadata(KVConnectorMetadata):  # type: ignore[misc]
    """From the scheduler to every worker, once per step."""

    plan: bytes = b""


@dataclass
class WorkerReports(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """From the workers to the scheduler: one report per rank that has something to say."""

    reports: list[bytes] = field(default_factory=list)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReports:
        """Both ranks' reports."""
        assert isinstance(other, WorkerReports)
        return WorkerReports(self.reports + other.reports)
