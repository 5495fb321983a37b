"""Greenroom's connector with a witness: what is copied, under which hash, and a digest of the bytes.

Runs inside vLLM (`AUDITED` in `rigs` names it), in the place of `GreenroomConnector`, and changes nothing of it. Every
process appends JSON lines to the file that `GREENROOM_AUDIT` names; `audit` reads them.

The witness shares nothing with what it watches: block hashes are vLLM's own, bytes are read through vLLM's tensors and
not at Greenroom's addresses, plans are decoded apart.

* A save is digested when its copy starts. Its blocks are full then, and vLLM does not write full blocks again as long
  as they are theirs: the arena must get these bytes. (Not when the copy is reported: a fenced save may have ended well
  before its blocks were given away, and they hold other bytes by then.)
* A load is digested when its end is reported: the blocks are still kept for the request, or for the prefetch.

Each rank digests its own shards and says which rank it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import torch

from greenroom.vllm.connector import GreenroomConnector
from real_vllm.plans import Job, read_plan, read_report

HASH_BYTES = 32


class AuditingConnector(GreenroomConnector):
    """See the module."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        self._witness = Witness(os.environ["GREENROOM_AUDIT"], vllm_config.kv_transfer_config.engine_id)
        self._parallel = vllm_config.parallel_config
        self._blocks_total = kv_cache_config.num_blocks
        self._pool: Any = None
        self._caches: list[Any] = []
        self._expected: dict[int, bytes] = {}
        """GPU block → hash of the block that a request's table wants there."""
        self._fetches: dict[int, Job] = {}
        self._jobs: dict[int, Job] = {}
        self._starting: list[Job] = []
        super().__init__(vllm_config, role, kv_cache_config)

    # The scheduler's half

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        super().bind_gpu_block_pool(gpu_block_pool)
        self._pool = gpu_block_pool
        adapter: Any = self._scheduler._pool
        publish = adapter.publish

        def published(entries: Sequence[tuple[int, bytes, int]]) -> None:
            publish(entries)
            self._published({block: bytes(block_hash) for block, block_hash, _ in entries})

        adapter.publish = published

    def on_new_request(self, request: Any) -> None:
        self._witness.say("request", id=request.request_id, hashes=[one.hex() for one in request.block_hashes])
        _take_hints(request)
        super().on_new_request(request)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if num_external_tokens > 0:
            (table,) = blocks.get_block_ids()
            self._expected.update(zip(table, request.block_hashes, strict=False))
        super().update_state_after_alloc(request, blocks, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        meta = super().build_connector_meta(scheduler_output)
        plan = read_plan(meta.plan)
        for job in plan.loads:
            if job.kind == "prefetch":
                self._fetches[job.id] = job
                self._planned(job, None)
            else:
                self._planned(job, [self._expected[block].hex() for block in job.blocks])
        for job in plan.saves:
            self._planned(job, [self._pool.blocks[block].block_hash[:HASH_BYTES].hex() for block in job.blocks])
        return meta

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._witness.say("finished", id=request.request_id, aborted=request.status.name == "FINISHED_ABORTED")
        return super().request_finished(request, block_ids)

    def reset_cache(self) -> bool:
        self._witness.say("reset")
        return super().reset_cache()

    def _planned(self, job: Job, hashes: list[str] | None) -> None:
        ranks = self._parallel.tensor_parallel_size
        self._witness.say(
            "planned", job=job.id, kind=job.kind, boot=job.boot, slots=job.slots, hashes=hashes, ranks=ranks
        )

    def _published(self, hashes: dict[int, bytes]) -> None:
        """A prefetch has ended: only now is it known in vLLM's terms what its blocks hold."""
        (job,) = [job for job in self._fetches.values() if set(job.blocks) == set(hashes)]
        del self._fetches[job.id]
        self._witness.say("published", job=job.id, hashes=[hashes[block].hex() for block in job.blocks])

    # The worker's half

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        self._caches = [cache for _, cache in sorted(kv_caches.items())]
        super().register_kv_caches(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        plan = read_plan(kv_connector_metadata.plan)
        self._jobs.update((job.id, job) for job in (*plan.loads, *plan.saves))
        self._starting += plan.saves
        super().handle_preemptions(kv_connector_metadata)

    def wait_for_save(self) -> None:
        self._digest_starting()
        super().wait_for_save()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        self._digest_starting()
        return super().get_finished(finished_req_ids)

    def build_connector_worker_meta(self) -> Any:
        reports = super().build_connector_worker_meta()
        for ended in [one for report in (reports.reports if reports else ()) for one in read_report(report)]:
            job = self._jobs.pop(ended.id)
            digests = None if job.kind == "save" or not ended.ok else [self._digest(block) for block in job.blocks]
            self._witness.say("ended", job=job.id, rank=self._parallel.rank, ok=ended.ok, digests=digests)
        return reports

    def _digest_starting(self) -> None:
        starting, self._starting = self._starting, []
        for job in starting:
            digests = [self._digest(block) for block in job.blocks]
            self._witness.say("saving", job=job.id, rank=self._parallel.rank, digests=digests)

    def _digest(self, block: int) -> str:
        """Of all that vLLM's tensors hold of this block."""
        digest = hashlib.blake2b(digest_size=16)
        for cache in self._caches:
            (outer,) = [dim for dim, size in enumerate(cache.shape) if size == self._blocks_total]
            digest.update(cache.select(outer, block).contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()


class Witness:
    """Appends lines to the log; each is one write, so that processes do not cut into each other's."""

    def __init__(self, path: str, engine: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._engine = engine

    def say(self, event: str, **fields: Any) -> None:
        """Writes one line. The clock is the machine's, the same in all processes."""
        line = json.dumps({"event": event, "engine": self._engine, "at": time.monotonic(), **fields}) + "\n"
        written = os.write(self._file, line.encode())
        assert written == len(line), "the disk is full"


def _take_hints(request: Any) -> None:
    """vLLM's engine takes hints with a request and its HTTP server does not: here they come in `kv_transfer_params`."""
    params = request.kv_transfer_params
    if isinstance(params, dict) and "kv_hints" in params:
        from vllm.v1.kv_hints import KvHintAction, KvHintsEnvelope

        envelope = dict(params["kv_hints"])
        actions = [KvHintAction(**action) for action in envelope.pop("actions")]
        request.kv_hints = KvHintsEnvelope(actions=actions, **envelope)
