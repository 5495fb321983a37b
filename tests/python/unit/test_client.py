"""The clients against a server of the standard library: what they send, what they make of answers."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import greenroom


class Fake:
    """A sidecar that records what it is asked and answers what it is told to."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.answers: dict[tuple[str, str], tuple[int, dict[str, str], bytes]] = {}
        self.hold = threading.Event()
        self.hold.set()
        self.arrived = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def serve(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                fake.seen.append((self.command, self.path, json.loads(body) if body else None))
                fake.headers.append(dict(self.headers))
                fake.arrived.set()
                fake.hold.wait()
                status, headers, answer = fake.answers.get((self.command, self.path), (200, {}, b"{}"))
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_DELETE = serve

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=lambda: self.server.serve_forever(poll_interval=0.01))
        self._thread.start()

    def answer(self, method: str, path: str, body: object, status: int = 200, **headers: str) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.answers[method, path] = (status, named, json.dumps(body).encode())

    def close(self) -> None:
        self.hold.set()
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def fake() -> Iterator[Fake]:
    server = Fake()
    yield server
    server.close()


class ToolFailed(Exception):
    pass


def test_tool_wait_sends_start_and_end(fake: Fake) -> None:
    client = greenroom.Client(fake.url)
    with client.tool_wait("s 1/ü", tool="pytest", detail="pytest -q", eta=1.5) as wait:
        wait.progress(fraction=0.5)
    (start, progress, end) = fake.seen
    path = "/v1/sessions/s%201%2F%C3%BC"
    call = start[2].pop("call_id")
    assert start == ("POST", f"{path}/tool_start", {"tool": "pytest", "detail": "pytest -q", "eta_ms": 1500})
    assert progress == ("POST", f"{path}/tool_progress", {"call_id": call, "fraction": 0.5})
    assert end == ("POST", f"{path}/tool_end", {"call_id": call, "ok": True})


def test_tool_wait_ends_when_the_body_raises(fake: Fake) -> None:
    with pytest.raises(ToolFailed), greenroom.Client(fake.url).tool_wait("s"):
        raise ToolFailed
    assert [path for _, path, _ in fake.seen] == ["/v1/sessions/s/tool_start", "/v1/sessions/s/tool_end"]
    assert fake.seen[1][2]["ok"] is False


def test_a_failing_sidecar_does_not_replace_the_exception_of_the_body(fake: Fake) -> None:
    fake.answer("POST", "/v1/sessions/s/tool_end", {"error": {"code": "busy", "message": "full"}}, 429)
    with pytest.raises(ToolFailed), greenroom.Client(fake.url).tool_wait("s"):
        raise ToolFailed
    assert len(fake.seen) == 2


def test_tool_wait_can_go_on_without_a_sidecar(caplog: pytest.LogCaptureFixture) -> None:
    unreachable = greenroom.Client("http://127.0.0.1:9", timeout=1)
    with pytest.raises(greenroom.Unavailable), unreachable.tool_wait("s"):
        pytest.fail("the body ran although the sidecar was not told")
    ran = False
    with unreachable.tool_wait("s", on_error="log"):
        ran = True
    assert ran
    assert len(caplog.records) == 2


def test_hints_carry_vllms_envelope_and_keep_the_order(fake: Fake) -> None:
    fake.answer(
        "POST",
        "/v1/hints",
        {
            "message_id": "m",
            "results": [{"action_id": "0", "outcome": "clipped"}, {"action_id": "1", "outcome": "missing"}],
        },
    )
    actions = [
        greenroom.Action("kv.pin", greenroom.Target(session="s"), ttl=60),
        greenroom.Action("kv.prefetch", greenroom.Target(block_hashes=[b"\x01\xff"]), eta=0.25, priority=2),
    ]
    results = greenroom.Client(fake.url).hints(actions, message_id="m")
    assert [one["outcome"] for one in results] == ["clipped", "missing"]
    assert fake.seen[0][2] == {
        "protocol_version": "1.0",
        "message_id": "m",
        "actions": [
            {
                "action_id": "0",
                "action_type": "kv.pin",
                "action_version": "1.0",
                "payload": {"target": {"session_id": "s"}, "ttl_ms": 60000},
            },
            {
                "action_id": "1",
                "action_type": "kv.prefetch",
                "action_version": "1.0",
                "payload": {"target": {"block_hashes": ["01ff"]}, "priority": 2, "eta_ms": 250},
            },
        ],
    }


def test_two_hints_without_a_message_id_get_different_ones(fake: Fake) -> None:
    fake.answer("POST", "/v1/hints", {"results": [{"action_id": "0", "outcome": "accepted"}]})
    client = greenroom.Client(fake.url)
    assert client.prefetch("s")["outcome"] == "accepted"
    assert client.unpin("s")["outcome"] == "accepted"
    assert fake.seen[0][2]["message_id"] != fake.seen[1][2]["message_id"]


@pytest.mark.parametrize(
    "target", [greenroom.Target(), greenroom.Target(session="s", request="r")], ids=["none", "two"]
)
def test_a_target_is_one_thing(target: greenroom.Target) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        greenroom.Client("http://127.0.0.1:9").hint("kv.pin", target)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, greenroom.BadRequest),
        (401, greenroom.Unauthorized),
        (404, greenroom.NotFound),
        (409, greenroom.Conflict),
        (413, greenroom.TooLarge),
        (429, greenroom.Busy),
        (500, greenroom.Unavailable),
        (503, greenroom.Unavailable),
    ],
)
def test_every_status_has_its_exception(fake: Fake, status: int, kind: type[greenroom.GreenroomError]) -> None:
    fake.answer("GET", "/v1/status", {"error": {"code": "why", "message": "because"}}, status, Retry_After="2")
    with pytest.raises(kind) as raised:
        greenroom.Client(fake.url).status()
    assert (raised.value.code, raised.value.message) == ("why", "because")
    assert type(raised.value) is kind
    if isinstance(raised.value, greenroom.Busy):
        assert raised.value.retry_after == 2.0


def test_an_answer_that_is_not_greenrooms_is_said_to_be_so(fake: Fake) -> None:
    fake.answers["GET", "/v1/status"] = (200, {}, b"<html>")
    fake.answers["GET", "/v1/sessions/s"] = (502, {}, b"<html>")
    fake.answer("POST", "/v1/hints", {"results": []})
    client = greenroom.Client(fake.url)
    with pytest.raises(greenroom.ProtocolError):
        client.status()
    with pytest.raises(greenroom.Unavailable) as raised:
        client.session("s")
    assert raised.value.code == "http_502"
    with pytest.raises(greenroom.ProtocolError):
        client.pin("s")


def test_a_silent_sidecar_is_unavailable_after_the_timeout(fake: Fake) -> None:
    fake.hold.clear()
    with pytest.raises(greenroom.Unavailable) as raised:
        greenroom.Client(fake.url, timeout=0.05).status()
    assert raised.value.code == "timeout"


def test_the_token_is_sent_and_never_shown(fake: Fake) -> None:
    client = greenroom.Client(fake.url, token="s3cret")
    client.retire("s")
    assert fake.seen == [("DELETE", "/v1/sessions/s", None)]
    assert fake.headers[0]["Authorization"] == "Bearer s3cret"
    assert "s3cret" not in repr(client)


def test_a_path_in_the_address_is_kept(fake: Fake) -> None:
    fake.answer("GET", "/kv/v1/sessions", {"sessions": [{"id": "a"}]})
    assert greenroom.Client(f"{fake.url}/kv/").sessions() == [{"id": "a"}]


@pytest.mark.parametrize("url", ["127.0.0.1:7411", "unix:///run/greenroom.sock", ""])
def test_an_address_that_is_not_http_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        greenroom.Client(url)


def test_the_async_client_says_the_same(fake: Fake) -> None:
    async def agent() -> None:
        client = greenroom.AsyncClient(fake.url, token="t")
        async with client.tool_wait("s", tool="bash", call_id="c") as wait:
            await wait.progress(eta=3)
        await client.retire("s")

    asyncio.run(agent())
    assert fake.seen == [
        ("POST", "/v1/sessions/s/tool_start", {"tool": "bash", "call_id": "c"}),
        ("POST", "/v1/sessions/s/tool_progress", {"call_id": "c", "eta_ms": 3000}),
        ("POST", "/v1/sessions/s/tool_end", {"call_id": "c", "ok": True}),
        ("DELETE", "/v1/sessions/s", None),
    ]


def test_the_async_tool_wait_ends_when_its_task_is_cancelled(fake: Fake) -> None:
    async def agent(entered: asyncio.Event) -> None:
        async with greenroom.AsyncClient(fake.url).tool_wait("s", call_id="c"):
            entered.set()
            await asyncio.Event().wait()

    async def main() -> None:
        entered = asyncio.Event()
        task = asyncio.create_task(agent(entered))
        await entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert fake.seen[-1] == ("POST", "/v1/sessions/s/tool_end", {"call_id": "c", "ok": False})


def test_the_loop_runs_while_a_call_waits(fake: Fake) -> None:
    fake.hold.clear()

    async def main() -> None:
        call = asyncio.create_task(greenroom.AsyncClient(fake.url).status())
        # The server does not answer before this thread, the loop's, says so: a client that blocked it would hang here.
        await asyncio.to_thread(fake.arrived.wait)
        assert not call.done()
        fake.hold.set()
        assert await call == {}

    asyncio.run(main())
