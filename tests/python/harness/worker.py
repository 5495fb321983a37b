"""One rank's worker: the connector's half over that rank's shard of the pool, called as vLLM's model runner calls it.

A ``Worker`` lives in its engine's process, as with vLLM's executor `uni`. A ``WorkerProcess`` has one in a process of
its own, as with `mp`: that one can be killed.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import signal
from multiprocessing.connection import Connection
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer import kv_transfer_state
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole
from vllm.forward_context import set_forward_context
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.worker.kv_connector_model_runner_mixin import KVConnectorModelRunnerMixin

from harness import faults
from harness.model import Entries, Shard, entries_of

LAYER = "layer"
ANSWER_S = 30
# A fork of a process that has threads is not safe, and vLLM's modules take long to load: one server loads them once.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["harness.worker"])


class Worker:
    """The connector's worker half, in this process."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig, rank: int, entries: Entries) -> None:
        self._config = copy.copy(config)
        self._config.parallel_config = copy.copy(config.parallel_config)
        self._config.parallel_config.rank = rank
        self._connector = KVConnectorFactory.create_connector(self._config, KVConnectorRole.WORKER, kv)
        self._connector.register_kv_caches({LAYER: torch.from_numpy(entries)})
        self._step = contextlib.ExitStack()
        self._output: KVConnectorOutput | None = None

    def begin(self, scheduled: SchedulerOutput) -> None:
        """Before the forward pass."""
        # vLLM has one connector to a process.
        kv_transfer_state._KV_CONNECTOR_AGENT = self._connector
        self._connector.handle_preemptions(scheduled.kv_connector_metadata)
        self._step.enter_context(set_forward_context(None, self._config))
        context = KVConnectorModelRunnerMixin.maybe_get_kv_connector_output(scheduled)
        self._output = self._step.enter_context(context)

    def end(self) -> KVConnectorOutput:
        """After the forward pass. Of several workers in one process, the last that began ends first."""
        try:
            self._step.close()
        finally:
            kv_transfer_state._KV_CONNECTOR_AGENT = None
        output, self._output = self._output, None
        assert output is not None, "a step ends that has not begun"
        return output

    def set_fault(self, name: str, actions: str) -> None:
        """A fault point of this process: see ``faults``."""
        faults.set_fault(name, actions)

    def close(self) -> None:
        """Waits for running copies."""
        self._connector.shutdown()


class WorkerProcess:
    """The same in a process of its own."""

    def __init__(self, config: VllmConfig, kv: KVCacheConfig, rank: int, shard: Shard) -> None:
        self._pipe, theirs = _context.Pipe()
        arguments = (theirs, config, kv, rank, DupFd(shard.descriptor), shard.shape)
        self._process = _context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def begin(self, scheduled: SchedulerOutput) -> None:
        """As ``Worker.begin``."""
        self._ask("begin", scheduled)

    def end(self) -> KVConnectorOutput:
        """As ``Worker.end``."""
        output = self._ask("end")
        assert isinstance(output, KVConnectorOutput)
        return output

    def set_fault(self, name: str, actions: str) -> None:
        """A fault point of that process."""
        self._ask("set_fault", name, actions)

    def close(self) -> None:
        """Waits for running copies and for the end of the process."""
        self._ask("close")
        self._process.join(ANSWER_S)
        self.kill()

    def kill(self) -> None:
        """`kill -9`, wherever its copies are; returns when the process is gone."""
        self._process.kill()
        self._process.join()
        self._pipe.close()

    def _ask(self, method: str, *arguments: Any) -> Any:
        self._pipe.send((method, arguments))
        return self._answer()

    def _answer(self) -> Any:
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"a worker process has not answered for {ANSWER_S} s")
        answer = self._pipe.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer


def _serve(pipe: Connection, config: VllmConfig, kv: KVCacheConfig, rank: int, shard: Any, shape: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = Worker(config, kv, rank, entries_of(shard.detach(), shape))
    pipe.send(None)
    # Ends with its engine's process, however that ends.
    with contextlib.suppress(EOFError):
        while True:
            method, arguments = pipe.recv()
            try:
                answer = getattr(worker, method)(*arguments)
            except Exception as error:
                answer = error
            pipe.send(answer)
