"""Engines are slow to start: tests share them by configuration, and only a few live at a time."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from support.servers import Rig, Say, Sidecar, VllmConfig, VllmServer, rig, silent

ALIVE_MAX = 2
"""Engines that run at the same time; each takes about 1.5 GiB and, while it computes, every core."""


@dataclasses.dataclass
class Engine:
    """One that was launched. `handle`: what its user gets."""

    handle: VllmServer | Rig
    server: VllmServer
    stack: contextlib.ExitStack
    ready: bool = False

    def well(self) -> bool:
        """Whether it answers, or may yet."""
        if self.ready:
            return self.server.healthy()
        return self.server.process is not None and self.server.process.running()


class Engines:
    """Hands out running servers. A server that died, or was killed by a test, is started anew."""

    def __init__(self, say: Say = silent) -> None:
        self._say = say
        self.wrongly_said: list[str] = []
        """What the logs of engines that have ended should not have told."""
        self._alive: OrderedDict[Any, Engine] = OrderedDict()

    def plain(self, config: VllmConfig) -> VllmServer:
        """vLLM without Greenroom."""
        server = self._ready(self._launch_plain(config))
        assert isinstance(server, VllmServer)
        return server

    def greenroom(self, config: VllmConfig, memory: str = "1GiB", kind: type[Sidecar] = Sidecar, **extra: Any) -> Rig:
        """vLLM with Greenroom and a sidecar of its own, of this kind."""
        made = self._ready(self._launch_rig(config, memory, kind, extra))
        assert isinstance(made, Rig)
        return made

    def both(
        self, plain: VllmConfig, config: VllmConfig, memory: str = "1GiB", kind: type[Sidecar] = Sidecar, **extra: Any
    ) -> tuple[VllmServer, Rig]:
        """vLLM without and with Greenroom, launched together: a start keeps little more than one core busy."""
        self._launch_plain(plain)
        self._launch_rig(config, memory, kind, extra)
        return self.plain(plain), self.greenroom(config, memory, kind, **extra)

    def _launch_plain(self, config: VllmConfig) -> Any:
        def launch(stack: contextlib.ExitStack) -> tuple[VllmServer, VllmServer]:
            server = VllmServer(config, name=f"plain-{config.version}")
            stack.push(server.__exit__)
            server.launch()
            return server, server

        return self._launch(("plain", config), launch)

    def _launch_rig(self, config: VllmConfig, memory: str, kind: type[Sidecar], extra: dict[str, Any]) -> Any:
        def launch(stack: contextlib.ExitStack) -> tuple[Rig, VllmServer]:
            made = stack.enter_context(rig(config, memory, f"greenroom-{config.version}", kind, **extra))
            return made, made.vllm

        return self._launch(("greenroom", config, memory, kind, tuple(sorted(extra.items()))), launch)

    def _launch(self, key: Any, launch: Callable[[contextlib.ExitStack], tuple[VllmServer | Rig, VllmServer]]) -> Any:
        """Sees to it that there is one; returns its key."""
        if key in self._alive and not self._alive[key].well():
            self._stop(key)
        if key not in self._alive:
            while len(self._alive) >= ALIVE_MAX:
                self._stop(next(iter(self._alive)))
            with contextlib.ExitStack() as stack:
                handle, server = launch(stack)
                self._alive[key] = Engine(handle, server, stack.pop_all())
        self._alive.move_to_end(key)
        return key

    def _ready(self, key: Any) -> VllmServer | Rig:
        """Waits for its start."""
        engine = self._alive[key]
        if not engine.ready:
            try:
                engine.server.wait_ready(self._say)
            except BaseException:
                self._stop(key)
                raise
            engine.ready = True
        return engine.handle

    def _stop(self, key: Any) -> None:
        engine = self._alive.pop(key)
        engine.stack.close()
        self.wrongly_said += engine.server.wrongly_said()

    def close(self) -> None:
        for key in list(self._alive):
            self._stop(key)

    def log_tails(self) -> str:
        """The ends of all logs, for a failed test's report."""
        tails = []
        for engine in self._alive.values():
            sidecar = engine.handle.sidecar if isinstance(engine.handle, Rig) else None
            children = [engine.server.process, *([sidecar.process] if sidecar else [])]
            tails += [child.log_tail() for child in children if child is not None]
        return "\n".join(tails)
