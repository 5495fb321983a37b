"""The HTTP API as data: what a call sends and how its answer is read. No I/O here.

Both clients are built on this file, so they cannot differ in what they say.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypedDict
from urllib.parse import quote

from greenroom import errors

ActionType = Literal["kv.prefetch", "kv.pin", "kv.unpin", "kv.retain", "kv.demote"]
Outcome = Literal["accepted", "clipped", "deferred", "rejected", "missing"]

PROTOCOL_VERSION = "1.0"
ACTION_VERSION = "1.0"


class SessionBlocks(TypedDict, total=False):
    """How many of a session's blocks are where."""

    gpu: int
    host: int
    pinned: int


class SessionInfo(TypedDict, total=False):
    """One session as ``GET /v1/sessions`` shows it. A newer sidecar may send more fields."""

    id: str
    state: str
    tokens: int
    blocks: SessionBlocks
    tool: Any
    expected_return_ms: int | None


class HintResult(TypedDict, total=False):
    """What became of one action of a hint."""

    action_id: str
    outcome: Outcome
    detail: str
    blocks: int


@dataclass(frozen=True)
class Target:
    """What an action is aimed at: exactly one of the three."""

    session: str | None = None
    request: str | None = None
    block_hashes: Sequence[bytes] | None = None

    def payload(self) -> dict[str, Any]:
        """The target as JSON.

        Raises:
            ValueError: none, or more than one, of the three is given.
        """
        given: dict[str, Any] = {}
        if self.session is not None:
            given["session_id"] = self.session
        if self.request is not None:
            given["request_id"] = self.request
        if self.block_hashes is not None:
            given["block_hashes"] = [one.hex() for one in self.block_hashes]
        if len(given) != 1:
            raise ValueError("a hint is aimed at exactly one of session, request and block_hashes")
        return given


@dataclass(frozen=True)
class Action:
    """One action of a hint. Times are seconds."""

    type: ActionType
    target: Target
    ttl: float | None = None
    priority: float | None = None
    eta: float | None = None

    def payload(self) -> dict[str, Any]:
        """The action's payload as JSON."""
        body: dict[str, Any] = {"target": self.target.payload()}
        _put(body, "ttl_ms", milliseconds(self.ttl))
        _put(body, "priority", self.priority)
        _put(body, "eta_ms", milliseconds(self.eta))
        return body


@dataclass(frozen=True)
class Call:
    """One HTTP exchange, still unsent."""

    method: str
    path: str
    body: bytes | None = None


def milliseconds(seconds: float | None) -> int | None:
    """Seconds of a Python caller as the API's whole milliseconds."""
    return None if seconds is None else round(seconds * 1000)


def _put(body: dict[str, Any], key: str, value: object) -> None:
    if value is not None:
        body[key] = value


def _post(path: str, body: Mapping[str, Any]) -> Call:
    return Call("POST", path, json.dumps(body, separators=(",", ":")).encode())


def _session_path(session: str, verb: str = "") -> str:
    if not session:
        raise ValueError("a session has a name")
    tail = f"/{verb}" if verb else ""
    return f"/v1/sessions/{quote(session, safe='')}{tail}"


def tool_start(session: str, tool: str, call_id: str | None, detail: str | None, eta: float | None) -> Call:
    """``POST …/tool_start``."""
    body: dict[str, Any] = {"tool": tool}
    _put(body, "call_id", call_id)
    _put(body, "detail", detail)
    _put(body, "eta_ms", milliseconds(eta))
    return _post(_session_path(session, "tool_start"), body)


def tool_progress(session: str, call_id: str | None, fraction: float | None, eta: float | None) -> Call:
    """``POST …/tool_progress``."""
    body: dict[str, Any] = {}
    _put(body, "call_id", call_id)
    _put(body, "fraction", fraction)
    _put(body, "eta_ms", milliseconds(eta))
    return _post(_session_path(session, "tool_progress"), body)


def tool_end(session: str, call_id: str | None, ok: bool | None) -> Call:
    """``POST …/tool_end``."""
    body: dict[str, Any] = {}
    _put(body, "call_id", call_id)
    _put(body, "ok", ok)
    return _post(_session_path(session, "tool_end"), body)


def session(name: str) -> Call:
    """``GET /v1/sessions/{id}``."""
    return Call("GET", _session_path(name))


def retire(name: str) -> Call:
    """``DELETE /v1/sessions/{id}``."""
    return Call("DELETE", _session_path(name))


SESSIONS = Call("GET", "/v1/sessions")
STATUS = Call("GET", "/v1/status")
HEALTH = Call("GET", "/healthz")


def hints(actions: Sequence[Action], message_id: str | None) -> Call:
    """``POST /v1/hints``: vLLM's own hint envelope. A repeated ``message_id`` gets its first answer again."""
    return _post(
        "/v1/hints",
        {
            "protocol_version": PROTOCOL_VERSION,
            "message_id": message_id or str(uuid.uuid4()),
            "actions": [
                {
                    "action_id": str(position),
                    "action_type": action.type,
                    "action_version": ACTION_VERSION,
                    "payload": action.payload(),
                }
                for position, action in enumerate(actions)
            ],
        },
    )


def hint_results(answer: object) -> list[HintResult]:
    """The outcomes out of a hint's answer, in the order of the actions."""
    results = member(answer, "results")
    if not isinstance(results, list):
        _unexpected("results is not a list")
    return results


def session_list(answer: object) -> list[SessionInfo]:
    """The sessions out of ``GET /v1/sessions``: a list, or an object that holds it."""
    sessions = answer if isinstance(answer, list) else member(answer, "sessions")
    if not isinstance(sessions, list):
        _unexpected("sessions is not a list")
    return sessions


def member(answer: object, key: str) -> Any:
    """A member that every answer of this kind has."""
    if not isinstance(answer, dict) or key not in answer:
        _unexpected(f"{key} is missing")
    return answer[key]


def _unexpected(what: str) -> NoReturn:
    raise errors.ProtocolError("protocol", f"the sidecar's answer cannot be read: {what}")


def read(status: int, retry_after: str | None, body: bytes) -> Any:
    """An answer's JSON (None if it has no body), or the exception that its status calls for.

    Raises:
        GreenroomError: the class of the status, with the code and the message of the body.
    """
    if 200 <= status < 300:
        if not body:
            return None
        try:
            return json.loads(body)
        except ValueError:
            _unexpected("it is not JSON")
    code, message = _reason(status, body)
    if status == 429:
        raise errors.Busy(code, message, _seconds(retry_after))
    raise _CLASSES.get(status, errors.Unavailable if status >= 500 else errors.BadRequest)(code, message)


_CLASSES: dict[int, type[errors.GreenroomError]] = {
    400: errors.BadRequest,
    401: errors.Unauthorized,
    404: errors.NotFound,
    409: errors.Conflict,
    413: errors.TooLarge,
    422: errors.BadRequest,
    503: errors.Unavailable,
}


def _reason(status: int, body: bytes) -> tuple[str, str]:
    try:
        error = json.loads(body)["error"]
        return str(error["code"]), str(error["message"])
    except (ValueError, KeyError, TypeError):
        return f"http_{status}", f"the sidecar answered {status} without a reason"


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, float(retry_after or 0))
    except ValueError:
        return 0.0
