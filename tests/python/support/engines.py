"""Engines are slow to start: tests share them by configuration, and only a few live at a time."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from support.servers import Rig, Say, Sidecar, VllmConfig, VllmServer, rig, silent

ALIVE_MAX = 2
"""Engines that run at the same time; each takes about 1.5 GiB and, while it computes, every core."""


class Engines:
    """Hands out running servers. A server that died, or was killed by a test, is started anew."""

    def __init__(self, say: Say = silent) -> None:
        self._say = say
        self._alive: OrderedDict[Any, tuple[Any, VllmServer, contextlib.ExitStack]] = OrderedDict()

    def plain(self, config: VllmConfig) -> VllmServer:
        """vLLM without Greenroom."""

        def start(stack: contextlib.ExitStack) -> tuple[VllmServer, VllmServer]:
            server = VllmServer(config, name=f"plain-{config.version}")
            stack.push(server.__exit__)
            server.start(self._say)
            return server, server

        server: VllmServer = self._get(("plain", config), start)
        return server

    def greenroom(self, config: VllmConfig, memory: str = "1GiB", kind: type[Sidecar] = Sidecar, **extra: Any) -> Rig:
        """vLLM with Greenroom and a sidecar of its own, of this kind."""

        def start(stack: contextlib.ExitStack) -> tuple[Rig, VllmServer]:
            made = stack.enter_context(rig(config, memory, self._say, f"greenroom-{config.version}", kind, **extra))
            return made, made.vllm

        shared: Rig = self._get(("greenroom", config, memory, kind, tuple(sorted(extra.items()))), start)
        return shared

    def _get(self, key: Any, start: Callable[[contextlib.ExitStack], tuple[Any, VllmServer]]) -> Any:
        if key in self._alive and not self._alive[key][1].healthy():
            self._stop(key)
        if key not in self._alive:
            while len(self._alive) >= ALIVE_MAX:
                self._stop(next(iter(self._alive)))
            with contextlib.ExitStack() as stack:
                handle, server = start(stack)
                self._alive[key] = (handle, server, stack.pop_all())
        self._alive.move_to_end(key)
        return self._alive[key][0]

    def _stop(self, key: Any) -> None:
        self._alive.pop(key)[2].close()

    def close(self) -> None:
        for key in list(self._alive):
            self._stop(key)

    def log_tails(self) -> str:
        """The ends of all logs, for a failed test's report."""
        tails = []
        for handle, server, _ in self._alive.values():
            children = [server.process] + ([handle.sidecar.process] if isinstance(handle, Rig) else [])
            tails += [child.log_tail() for child in children if child is not None]
        return "\n".join(tails)
