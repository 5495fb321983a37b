"""The smallest agent that uses Greenroom: one header for vLLM, one `with` around each tool.

    python agent_loop.py --task "How many files are in this folder?"

Needs a running `greenroom serve` and a vLLM that is connected to it. Runs what the model asks for in a shell: use a
sandbox.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import uuid
from typing import Any
from urllib.parse import urlsplit

from greenroom import Client

TURNS_MAX = 20
TOOL_TIMEOUT_S = 300
REQUEST_TIMEOUT_S = 600
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "bash",
            "description": "Runs a shell command and returns its output.",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string"}},
                "required": ["command"],
            },
        },
    }
]


def chat(vllm: str, session: str, model: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """One turn. `X-Session-ID` says which session it belongs to: the same name that the tool events carry."""
    url = urlsplit(vllm)
    connection = http.client.HTTPConnection(url.hostname or "127.0.0.1", url.port, timeout=REQUEST_TIMEOUT_S)
    body = json.dumps({"model": model, "messages": messages, "tools": TOOLS})
    try:
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json", "X-Session-ID": session}
        )
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise RuntimeError(f"vLLM answered {answer.status}: {text[:500]!r}")
    message: dict[str, Any] = json.loads(text)["choices"][0]["message"]
    return message


def run_tool(greenroom: Client, session: str, call: dict[str, Any]) -> str:
    """Runs one tool call. While the `with` lasts other agents may have the GPU; at its end the KV comes back."""
    command = json.loads(call["function"]["arguments"])["command"]
    with greenroom.tool_wait(session, tool="bash", call_id=call["id"], on_error="log"):
        done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False)
    return done.stdout + done.stderr


def run(vllm: str, greenroom: Client, model: str, task: str, session: str) -> str:
    """Turns and tools in alternation until the model answers without asking for a tool."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": task}]
    for _ in range(TURNS_MAX):
        message = chat(vllm, session, model, messages)
        messages.append(message)
        calls = message.get("tool_calls") or []
        if not calls:
            return str(message.get("content"))
        for call in calls:
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": run_tool(greenroom, session, call)})
    raise RuntimeError(f"no answer after {TURNS_MAX} turns")


def main() -> None:
    parser = argparse.ArgumentParser(description="A small agent beside Greenroom.")
    parser.add_argument("--vllm", default="http://127.0.0.1:8000")
    parser.add_argument("--greenroom", default="http://127.0.0.1:7411")
    parser.add_argument("--model", default="model")
    parser.add_argument("--task", required=True)
    options = parser.parse_args()
    print(run(options.vllm, Client(options.greenroom, timeout=0.3), options.model, options.task, uuid.uuid4().hex))


if __name__ == "__main__":
    main()
