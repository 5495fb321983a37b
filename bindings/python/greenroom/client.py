"""Clients of the sidecar's HTTP API, for agents and harnesses. Standard library only.

>>> client = Client("http://127.0.0.1:7411")
>>> with client.tool_wait("my-session", tool="bash"):
...     run_the_tool()

A client holds no connection between calls and may be shared by threads. Times are seconds.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal
from urllib.parse import urlsplit

from greenroom import _wire, errors
from greenroom._wire import Action, ActionType, HintResult, SessionInfo, Target

DEFAULT_URL = "http://127.0.0.1:7411"
DEFAULT_TIMEOUT = 5.0
"""Seconds for a whole call's connection and for each wait for bytes."""
ANSWER_BYTES_MAX = 64 * 1024 * 1024
"""An answer beyond this is not read to its end."""

OnError = Literal["raise", "log"]

_log = logging.getLogger("greenroom")


class _Endpoint:
    """Where the sidecar is and how to reach it. One exchange per connection."""

    def __init__(self, url: str, token: str | None, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http address: {url!r}")
        self._host = parts.hostname
        self._port = parts.port
        self._tls = parts.scheme == "https"
        self._prefix = parts.path.rstrip("/")
        self._token = token
        self._timeout = timeout

    def exchange(self, call: _wire.Call) -> Any:
        """Sends a call and reads its answer.

        Raises:
            GreenroomError: the sidecar refused it, or cannot be reached (``Unavailable``).
        """
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        headers = {"Accept": "application/json", "Connection": "close"}
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            connection.request(call.method, self._prefix + call.path, body=call.body, headers=headers)
            answer = connection.getresponse()
            body = answer.read(ANSWER_BYTES_MAX)
        except TimeoutError as error:
            raise errors.Unavailable("timeout", f"the sidecar did not answer within {self._timeout} s") from error
        except (OSError, http.client.HTTPException) as error:
            raise errors.Unavailable("unreachable", f"the sidecar cannot be reached: {error}") from error
        finally:
            connection.close()
        return _wire.read(answer.status, answer.getheader("Retry-After"), body)


class ToolWait:
    """A running tool call, as ``Client.tool_wait`` hands it to the body of the ``with``."""

    def __init__(self, client: Client, session: str, call_id: str) -> None:
        self._client = client
        self.session = session
        self.call_id = call_id

    def progress(self, *, fraction: float | None = None, eta: float | None = None) -> None:
        """Says how far the tool is; see ``Client.tool_progress``."""
        self._client.tool_progress(self.session, call_id=self.call_id, fraction=fraction, eta=eta)


class Client:
    """The sidecar, for code that may block."""

    def __init__(self, url: str = DEFAULT_URL, *, token: str | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._endpoint = _Endpoint(url, token, timeout)

    @contextmanager
    def tool_wait(
        self,
        session: str,
        tool: str = "bash",
        *,
        call_id: str | None = None,
        detail: str | None = None,
        eta: float | None = None,
        on_error: OnError = "raise",
    ) -> Iterator[ToolWait]:
        """Tells the sidecar that the body is a tool call: ``tool_start`` on entry, ``tool_end`` on every exit.

        With ``on_error="log"`` a sidecar that cannot be told is logged and the body runs all the same. An exception
        of the body is never replaced by one of Greenroom's.
        """
        call = call_id or uuid.uuid4().hex
        with _reported(on_error):
            self.tool_start(session, tool, call_id=call, detail=detail, eta=eta)
        try:
            yield ToolWait(self, session, call)
        except BaseException:
            with _reported("log"):
                self.tool_end(session, call_id=call, ok=False)
            raise
        with _reported(on_error):
            self.tool_end(session, call_id=call, ok=True)

    def tool_start(
        self,
        session: str,
        tool: str,
        *,
        call_id: str | None = None,
        detail: str | None = None,
        eta: float | None = None,
    ) -> None:
        """The session waits for a tool. A session that is not known yet is created."""
        self._endpoint.exchange(_wire.tool_start(session, tool, call_id, detail, eta))

    def tool_progress(
        self, session: str, *, call_id: str | None = None, fraction: float | None = None, eta: float | None = None
    ) -> None:
        """News of a running tool: the share done (0 to 1), or the time until it returns."""
        self._endpoint.exchange(_wire.tool_progress(session, call_id, fraction, eta))

    def tool_end(self, session: str, *, call_id: str | None = None, ok: bool | None = None) -> None:
        """The tool returned: the session's KV is wanted back now."""
        self._endpoint.exchange(_wire.tool_end(session, call_id, ok))

    def hint(
        self,
        action: ActionType,
        target: Target,
        *,
        ttl: float | None = None,
        priority: float | None = None,
        eta: float | None = None,
    ) -> HintResult:
        """Sends one hint and returns what became of it."""
        return self.hints([Action(action, target, ttl=ttl, priority=priority, eta=eta)])[0]

    def hints(self, actions: Sequence[Action], *, message_id: str | None = None) -> list[HintResult]:
        """Sends several hints in one envelope; the outcomes come in the order of the actions.

        A ``message_id`` that was sent before gets its first answer again and nothing is done twice.
        """
        results = _wire.hint_results(self._endpoint.exchange(_wire.hints(actions, message_id)))
        return _checked(results, len(actions))

    def prefetch(self, session: str, *, eta: float | None = None, priority: float | None = None) -> HintResult:
        """Asks for the session's KV on the GPU, now or in ``eta`` seconds."""
        return self.hint("kv.prefetch", Target(session=session), eta=eta, priority=priority)

    def pin(self, session: str, *, ttl: float | None = None) -> HintResult:
        """Keeps the session's KV from being evicted from host memory for ``ttl`` seconds."""
        return self.hint("kv.pin", Target(session=session), ttl=ttl)

    def unpin(self, session: str) -> HintResult:
        """Takes the session's pins back."""
        return self.hint("kv.unpin", Target(session=session))

    def session(self, session: str) -> SessionInfo:
        """One session. Raises ``NotFound`` for an unknown one."""
        info: SessionInfo = self._endpoint.exchange(_wire.session(session))
        return info

    def sessions(self) -> list[SessionInfo]:
        """Every session the sidecar knows."""
        return _wire.session_list(self._endpoint.exchange(_wire.SESSIONS))

    def retire(self, session: str) -> None:
        """The session is over: its KV is freed everywhere."""
        self._endpoint.exchange(_wire.retire(session))

    def status(self) -> dict[str, Any]:
        """Tiers, engines and counters."""
        answer: dict[str, Any] = self._endpoint.exchange(_wire.STATUS)
        return answer

    def health(self) -> dict[str, Any]:
        """Version and boot id. Raises ``Unavailable`` while the sidecar drains."""
        answer: dict[str, Any] = self._endpoint.exchange(_wire.HEALTH)
        return answer


class AsyncToolWait:
    """A running tool call: the ``async with`` of ``AsyncClient.tool_wait``."""

    def __init__(self, client: AsyncClient, start: _wire.Call, session: str, call_id: str, on_error: OnError) -> None:
        self._client = client
        self._start = start
        self._on_error: OnError = on_error
        self.session = session
        self.call_id = call_id

    async def progress(self, *, fraction: float | None = None, eta: float | None = None) -> None:
        """Says how far the tool is; see ``AsyncClient.tool_progress``."""
        await self._client.tool_progress(self.session, call_id=self.call_id, fraction=fraction, eta=eta)

    async def __aenter__(self) -> AsyncToolWait:
        with _reported(self._on_error):
            await self._client._exchange(self._start)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _reported("log" if error is not None else self._on_error):
            await self._client.tool_end(self.session, call_id=self.call_id, ok=error is None)


class AsyncClient:
    """The sidecar, for code under asyncio. Exchanges run on the loop's default executor; the loop never blocks."""

    def __init__(self, url: str = DEFAULT_URL, *, token: str | None = None, timeout: float = DEFAULT_TIMEOUT) -> None:
        self._endpoint = _Endpoint(url, token, timeout)

    async def _exchange(self, call: _wire.Call) -> Any:
        return await asyncio.to_thread(self._endpoint.exchange, call)

    def tool_wait(
        self,
        session: str,
        tool: str = "bash",
        *,
        call_id: str | None = None,
        detail: str | None = None,
        eta: float | None = None,
        on_error: OnError = "raise",
    ) -> AsyncToolWait:
        """``async with``: ``tool_start`` on entry, ``tool_end`` on every exit. See ``Client.tool_wait``."""
        call = call_id or uuid.uuid4().hex
        return AsyncToolWait(self, _wire.tool_start(session, tool, call, detail, eta), session, call, on_error)

    async def tool_start(
        self,
        session: str,
        tool: str,
        *,
        call_id: str | None = None,
        detail: str | None = None,
        eta: float | None = None,
    ) -> None:
        """See ``Client.tool_start``."""
        await self._exchange(_wire.tool_start(session, tool, call_id, detail, eta))

    async def tool_progress(
        self, session: str, *, call_id: str | None = None, fraction: float | None = None, eta: float | None = None
    ) -> None:
        """See ``Client.tool_progress``."""
        await self._exchange(_wire.tool_progress(session, call_id, fraction, eta))

    async def tool_end(self, session: str, *, call_id: str | None = None, ok: bool | None = None) -> None:
        """See ``Client.tool_end``."""
        await self._exchange(_wire.tool_end(session, call_id, ok))

    async def hint(
        self,
        action: ActionType,
        target: Target,
        *,
        ttl: float | None = None,
        priority: float | None = None,
        eta: float | None = None,
    ) -> HintResult:
        """See ``Client.hint``."""
        return (await self.hints([Action(action, target, ttl=ttl, priority=priority, eta=eta)]))[0]

    async def hints(self, actions: Sequence[Action], *, message_id: str | None = None) -> list[HintResult]:
        """See ``Client.hints``."""
        results = _wire.hint_results(await self._exchange(_wire.hints(actions, message_id)))
        return _checked(results, len(actions))

    async def prefetch(self, session: str, *, eta: float | None = None, priority: float | None = None) -> HintResult:
        """See ``Client.prefetch``."""
        return await self.hint("kv.prefetch", Target(session=session), eta=eta, priority=priority)

    async def pin(self, session: str, *, ttl: float | None = None) -> HintResult:
        """See ``Client.pin``."""
        return await self.hint("kv.pin", Target(session=session), ttl=ttl)

    async def unpin(self, session: str) -> HintResult:
        """See ``Client.unpin``."""
        return await self.hint("kv.unpin", Target(session=session))

    async def session(self, session: str) -> SessionInfo:
        """See ``Client.session``."""
        info: SessionInfo = await self._exchange(_wire.session(session))
        return info

    async def sessions(self) -> list[SessionInfo]:
        """See ``Client.sessions``."""
        return _wire.session_list(await self._exchange(_wire.SESSIONS))

    async def retire(self, session: str) -> None:
        """See ``Client.retire``."""
        await self._exchange(_wire.retire(session))

    async def status(self) -> dict[str, Any]:
        """See ``Client.status``."""
        answer: dict[str, Any] = await self._exchange(_wire.STATUS)
        return answer

    async def health(self) -> dict[str, Any]:
        """See ``Client.health``."""
        answer: dict[str, Any] = await self._exchange(_wire.HEALTH)
        return answer


@contextmanager
def _reported(on_error: OnError) -> Iterator[None]:
    """Lets a Greenroom error through, or writes it to the log in its stead."""
    try:
        yield
    except errors.GreenroomError as error:
        if on_error == "raise":
            raise
        _log.warning("Greenroom was not told of a tool call: %s", error)


def _checked(results: list[HintResult], expected: int) -> list[HintResult]:
    if len(results) != expected:
        raise errors.ProtocolError("protocol", f"{expected} actions were answered by {len(results)} results")
    return results
