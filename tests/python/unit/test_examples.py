"""The example scripts for harnesses, against servers of the standard library."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import greenroom

EXAMPLES = Path(__file__).resolve().parents[3] / "bindings" / "examples"
HOOK = EXAMPLES / "claude_code_hook.py"


class Recorder:
    """Answers every request with the next of `answers` (else an empty object) and notes it down."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: list[tuple[int, Any]] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                recorder.calls.append((self.command, self.path, json.loads(body) if body else None))
                recorder.headers.append(dict(self.headers))
                status, content = recorder.answers.pop(0) if recorder.answers else (200, {})
                text = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_POST = do_DELETE = do_GET = answer

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def sidecar() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.close()


@pytest.fixture
def vllm() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.close()


def run_hook(stdin: bytes, **env: str) -> subprocess.CompletedProcess[bytes]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GREENROOM_")}
    return subprocess.run(
        [sys.executable, "-S", str(HOOK)],
        input=stdin,
        env={**clean, **env},
        capture_output=True,
        timeout=60,
        check=False,
    )


def event(name: str, **fields: Any) -> bytes:
    common = {"session_id": "abc", "transcript_path": "t.jsonl", "cwd": ".", "hook_event_name": name}
    return json.dumps({**common, **fields}).encode()


TOOL = {"tool_name": "Bash", "tool_input": {"command": "make"}, "tool_use_id": "toolu_1"}


@pytest.mark.parametrize(
    ("stdin", "call"),
    [
        (event("PreToolUse", **TOOL), ("POST", "/v1/sessions/abc/tool_start", {"tool": "Bash", "call_id": "toolu_1"})),
        (event("PostToolUse", **TOOL), ("POST", "/v1/sessions/abc/tool_end", {"ok": True, "call_id": "toolu_1"})),
        (
            event("PostToolUseFailure", **TOOL),
            ("POST", "/v1/sessions/abc/tool_end", {"ok": False, "call_id": "toolu_1"}),
        ),
        (event("PreToolUse", tool_name="Read"), ("POST", "/v1/sessions/abc/tool_start", {"tool": "Read"})),
        (event("SessionEnd"), ("DELETE", "/v1/sessions/abc", None)),
    ],
)
def test_hook_tells_of_tools(sidecar: Recorder, stdin: bytes, call: tuple[str, str, Any]) -> None:
    done = run_hook(stdin, GREENROOM_URL=sidecar.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert sidecar.calls == [call]


def test_hook_uses_the_name_that_vllm_gets(sidecar: Recorder, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    run_hook(
        event("PreToolUse", **TOOL),
        GREENROOM_URL=sidecar.url,
        GREENROOM_SESSION="a b/ü",
        GREENROOM_TOKEN_FILE=str(token),
    )
    assert sidecar.calls[0][1] == "/v1/sessions/a%20b%2F%C3%BC/tool_start"
    assert sidecar.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    "stdin",
    [b"", b"{", b"[]", b"7", event("Stop"), event("PreToolUse", agent_id="sub", **TOOL), b'{"hook_event_name": null}'],
)
def test_hook_is_silent_where_there_is_nothing_to_tell(sidecar: Recorder, stdin: bytes) -> None:
    done = run_hook(stdin, GREENROOM_URL=sidecar.url)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert sidecar.calls == []


def test_hook_survives_a_sidecar_that_is_away_or_angry(sidecar: Recorder) -> None:
    sidecar.answers = [(503, {"error": {"code": "draining", "message": "later"}})]
    assert run_hook(event("PreToolUse", **TOOL), GREENROOM_URL=sidecar.url).returncode == 0
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = f"http://127.0.0.1:{closed.getsockname()[1]}"
        done = run_hook(event("PreToolUse", **TOOL), GREENROOM_URL=gone)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    told = run_hook(event("PreToolUse", **TOOL), GREENROOM_URL="nonsense", GREENROOM_DEBUG="1")
    assert told.returncode == 0
    assert b"greenroom hook" in told.stderr


def test_hook_gives_up_on_a_sidecar_that_never_answers() -> None:
    """The hook's own limit ends it; the kernel accepts the connection and nobody ever reads from it."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        done = run_hook(event("PreToolUse", **TOOL), GREENROOM_URL=f"http://127.0.0.1:{mute.getsockname()[1]}")
    assert (done.returncode, done.stdout) == (0, b"")


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_agent_loop_names_the_session_and_brackets_its_tools(sidecar: Recorder, vllm: Recorder) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "bash", "arguments": '{"command": "echo 42"}'}}
    vllm.answers = [
        (200, {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [call]}}]}),
        (200, {"choices": [{"message": {"role": "assistant", "content": "42 it is"}}]}),
    ]
    answer = load("agent_loop").run(vllm.url, greenroom.Client(sidecar.url), "model", "What?", "agent-7")
    assert answer == "42 it is"
    assert [headers["X-Session-ID"] for headers in vllm.headers] == ["agent-7", "agent-7"]
    assert vllm.calls[1][2]["messages"][-1] == {"role": "tool", "tool_call_id": "call_1", "content": "42\n"}
    assert [path for _, path, _ in sidecar.calls] == [
        "/v1/sessions/agent-7/tool_start",
        "/v1/sessions/agent-7/tool_end",
    ]
    assert {body["call_id"] for _, _, body in sidecar.calls} == {"call_1"}


class ActionEvent:
    tool_name = "terminal"
    tool_call_id = "c1"


class ObservationEvent:
    tool_call_id = "c1"


class AgentErrorEvent:
    tool_call_id = "c2"


class MessageEvent:
    pass


def test_openhands_callback_brackets_tools(sidecar: Recorder) -> None:
    callback = load("openhands_callback").ToolEvents("conversation", greenroom.Client(sidecar.url))
    for each in (ActionEvent(), MessageEvent(), ObservationEvent(), AgentErrorEvent()):
        callback(each)
    assert [(path, body.get("call_id"), body.get("ok")) for _, path, body in sidecar.calls] == [
        ("/v1/sessions/conversation/tool_start", "c1", None),
        ("/v1/sessions/conversation/tool_end", "c1", True),
        ("/v1/sessions/conversation/tool_end", "c2", False),
    ]


def test_openhands_callback_never_disturbs_the_agent() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        client = greenroom.Client(f"http://127.0.0.1:{closed.getsockname()[1]}")
        load("openhands_callback").ToolEvents("conversation", client)(ActionEvent())
