"""Greenroom for Python.

For agents: ``Client`` and ``AsyncClient`` tell the sidecar what an agent is doing. For vLLM: ``greenroom.vllm`` holds
the connector; it is imported only by vLLM and this module does not need it.
"""

from __future__ import annotations

from greenroom._wire import Action, ActionType, HintResult, Outcome, SessionBlocks, SessionInfo, Target
from greenroom.client import AsyncClient, AsyncToolWait, Client, ToolWait
from greenroom.errors import (
    BadRequest,
    Busy,
    ConfigError,
    Conflict,
    GreenroomError,
    NotFound,
    ProtocolError,
    TooLarge,
    Unauthorized,
    Unavailable,
)

__all__ = [
    "Action",
    "ActionType",
    "AsyncClient",
    "AsyncToolWait",
    "BadRequest",
    "Busy",
    "Client",
    "ConfigError",
    "Conflict",
    "GreenroomError",
    "HintResult",
    "NotFound",
    "Outcome",
    "ProtocolError",
    "SessionBlocks",
    "SessionInfo",
    "Target",
    "TooLarge",
    "ToolWait",
    "Unauthorized",
    "Unavailable",
]
