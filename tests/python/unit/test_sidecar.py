"""Both clients and the example scripts against a real sidecar that wants a token: it understands what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

import greenroom
from greenroom import errors
from support.servers import Sidecar
from unit.test_examples import TOOL, ActionEvent, ObservationEvent, event, load, run_hook

TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def token_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture(scope="module")
def sidecar(token_file: Path) -> Iterator[Sidecar]:
    with Sidecar("64MiB", ("--token-file", str(token_file))) as sidecar:
        yield sidecar


@pytest.fixture
def client(sidecar: Sidecar) -> greenroom.Client:
    return greenroom.Client(sidecar.url, token=TOKEN)


def test_client(client: greenroom.Client) -> None:
    with client.tool_wait("agent", tool="bash", call_id="c", eta=60) as wait:
        wait.progress(fraction=0.5)
        seen = client.session("agent")
        assert (seen["id"], seen["tool"]) == ("agent", "bash")
        # As much is still to come as has been, instead of the minute that was said before.
        back = seen["expected_return_ms"]
        assert back is not None
        assert back < 30_000
    assert client.session("agent")["tool"] is None
    assert "agent" in [one["id"] for one in client.sessions()]
    # No engine has served it a turn yet.
    assert client.prefetch("agent", eta=1, priority=2)["outcome"] == "missing"
    assert client.pin("agent", ttl=5)["outcome"] == "missing"
    assert client.unpin("agent")["outcome"] == "missing"
    client.retire("agent")
    with pytest.raises(errors.NotFound):
        client.session("agent")
    assert client.status()["engines"] == []
    assert client.health()["version"]


def test_every_action_is_known(client: greenroom.Client) -> None:
    target = greenroom.Target(block_hashes=[bytes(32)])
    kinds = get_args(greenroom.ActionType)
    results = client.hints([greenroom.Action(kind, target) for kind in kinds])
    assert [result["outcome"] for result in results] == ["missing"] * len(kinds)


def test_async_client(sidecar: Sidecar, client: greenroom.Client) -> None:
    async def tool() -> None:
        own = greenroom.AsyncClient(sidecar.url, token=TOKEN)
        async with own.tool_wait("async-agent", tool="search"):
            assert (await own.session("async-agent"))["tool"] == "search"

    asyncio.run(tool())
    assert client.session("async-agent")["tool"] is None


@pytest.mark.parametrize("token", [None, "another"])
def test_a_client_without_the_token_is_told_so(sidecar: Sidecar, token: str | None) -> None:
    with pytest.raises(errors.Unauthorized):
        greenroom.Client(sidecar.url, token=token).tool_start("thief", "bash")


def test_claude_code_hook(sidecar: Sidecar, client: greenroom.Client, token_file: Path) -> None:
    env = {"GREENROOM_URL": sidecar.url, "GREENROOM_SESSION": "a b/ü", "GREENROOM_TOKEN_FILE": str(token_file)}

    def tell(name: str, **fields: Any) -> None:
        assert run_hook(event(name, **fields), **env, GREENROOM_DEBUG="1").stderr == b""

    tell("PreToolUse", **TOOL)
    assert client.session("a b/ü")["tool"] == "Bash"
    tell("PostToolUseFailure", **TOOL)
    assert client.session("a b/ü")["tool"] is None
    tell("SessionEnd")
    with pytest.raises(errors.NotFound):
        client.session("a b/ü")


def test_openhands_callback(client: greenroom.Client) -> None:
    callback = load("openhands_callback").ToolEvents("conversation", client)
    callback(ActionEvent())
    assert client.session("conversation")["tool"] == "terminal"
    callback(ObservationEvent())
    assert client.session("conversation")["tool"] is None


def test_agent_loop(client: greenroom.Client) -> None:
    call = {"id": "c", "type": "function", "function": {"name": "bash", "arguments": '{"command": "echo 42"}'}}
    assert load("agent_loop").run_tool(client, "loop", call) == "42\n"
    seen = client.session("loop")
    assert (seen["id"], seen["tool"]) == ("loop", None)
