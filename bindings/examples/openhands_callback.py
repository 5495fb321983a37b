"""OpenHands: a conversation callback that tells Greenroom when a tool starts and ends.

    session = uuid.uuid4().hex
    llm = LLM(model="openai/…", base_url="http://127.0.0.1:8000/v1", extra_headers={"X-Session-ID": session})
    conversation = Conversation(agent=Agent(llm=llm, tools=…), callbacks=[ToolEvents(session)])

Looks at events by the names of their classes, so it needs no import from OpenHands and works with any harness that
announces a tool call and its result as objects with a `tool_call_id`.
"""

from __future__ import annotations

import logging
from typing import Any

from greenroom import Client, GreenroomError

STARTS = {"ActionEvent"}
ENDS = {"ObservationEvent", "AgentErrorEvent", "UserRejectObservation"}

_log = logging.getLogger(__name__)


class ToolEvents:
    """Sends `tool_start` and `tool_end` of one session. A sidecar that cannot be reached never disturbs the agent."""

    def __init__(self, session: str, client: Client | None = None) -> None:
        self._session = session
        # Local and short: a callback runs in the agent's own loop.
        self._client = client or Client(timeout=0.3)

    def __call__(self, event: Any) -> None:
        name = type(event).__name__
        try:
            if name in STARTS:
                self._client.tool_start(self._session, event.tool_name, call_id=event.tool_call_id)
            elif name in ENDS:
                self._client.tool_end(self._session, call_id=event.tool_call_id, ok=name == "ObservationEvent")
        except GreenroomError as error:
            _log.warning("Greenroom was not told of %s: %s", name, error)
