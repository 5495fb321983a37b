#!/usr/bin/env python3
"""Claude Code hook: tells Greenroom when a tool starts and when it ends. Standard library only.

In `.claude/settings.json` (or `~/.claude/settings.json`):

    {"hooks": {
      "PreToolUse":         [{"matcher": "*", "hooks": [{"type": "command", "command": "/path/to/claude_code_hook.py"}]}],
      "PostToolUse":        [{"matcher": "*", "hooks": [{"type": "command", "command": "/path/to/claude_code_hook.py"}]}],
      "PostToolUseFailure": [{"matcher": "*", "hooks": [{"type": "command", "command": "/path/to/claude_code_hook.py"}]}],
      "SessionEnd":         [{"hooks": [{"type": "command", "command": "/path/to/claude_code_hook.py"}]}]
    }}

and start Claude Code against vLLM with one name for the session, which goes to vLLM as a header and to this hook:

    export GREENROOM_SESSION=$(uuidgen)
    export ANTHROPIC_CUSTOM_HEADERS="X-Session-ID: $GREENROOM_SESSION"
    export ANTHROPIC_BASE_URL=http://127.0.0.1:8000 ANTHROPIC_AUTH_TOKEN=any
    export ANTHROPIC_DEFAULT_{OPUS,SONNET,HAIKU}_MODEL=served-model-name
    claude

Environment: GREENROOM_URL (http://127.0.0.1:7411), GREENROOM_SESSION (else Claude Code's own session id),
GREENROOM_TOKEN_FILE (none). The hook never fails and never holds a tool up for longer than TIMEOUT_S: a hint that is
lost costs a reload, nothing else.
"""

from __future__ import annotations

import http.client
import json
import os
import sys
from typing import Any
from urllib.parse import quote, urlsplit

TIMEOUT_S = 0.3
INPUT_BYTES_MAX = 16 * 1024 * 1024


def call_for(event: dict[str, Any]) -> tuple[str, str, dict[str, Any] | None] | None:
    """Method, path and body of the call that tells of a hook event; None if there is nothing to tell."""
    session = os.environ.get("GREENROOM_SESSION") or event.get("session_id")
    # A subagent's tools run while the session itself still waits for the tool that started the subagent.
    if not session or event.get("agent_id"):
        return None
    path = "/v1/sessions/" + quote(session, safe="")
    call = {"call_id": event["tool_use_id"]} if event.get("tool_use_id") else {}
    name = event.get("hook_event_name")
    if name == "PreToolUse":
        return "POST", path + "/tool_start", {"tool": event.get("tool_name") or "unknown", **call}
    if name in ("PostToolUse", "PostToolUseFailure"):
        return "POST", path + "/tool_end", {"ok": name == "PostToolUse", **call}
    if name == "SessionEnd":
        return "DELETE", path, None
    return None


def send(method: str, path: str, body: dict[str, Any] | None) -> None:
    """One call with a short time limit; the answer does not matter."""
    url = urlsplit(os.environ.get("GREENROOM_URL", "http://127.0.0.1:7411"))
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    connection = kind(url.hostname, url.port, timeout=TIMEOUT_S)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    token_file = os.environ.get("GREENROOM_TOKEN_FILE")
    if token_file:
        with open(token_file) as file:
            headers["Authorization"] = "Bearer " + file.read().strip()
    try:
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        connection.getresponse()
    finally:
        connection.close()


def main() -> None:
    """Exit status 0 whatever happens: another one would be shown to the user, or block the tool."""
    try:
        call = call_for(json.loads(sys.stdin.buffer.read(INPUT_BYTES_MAX)))
        if call is not None:
            send(*call)
    except Exception as error:
        if os.environ.get("GREENROOM_DEBUG"):
            print(f"greenroom hook: {error!r}", file=sys.stderr)


if __name__ == "__main__":
    main()
