"""The whole installation is one flag: the sidecar that vLLM starts for itself, and what is refused at the start."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from real_vllm import steps
from real_vllm.rigs import PATIENT, PLAIN, STOCK
from support import rest
from support.engines import Engines
from support.flood import flood
from support.process import wait_until
from support.said import our_lines
from support.servers import Connector, Sidecar, VllmServer, greenroom_transfer_config

pytestmark = pytest.mark.vllm

ENTRY_POINT = Connector(module=None)
"""Found through the wheel's entry point, as by `"kv_connector": "GreenroomConnector"` alone."""
GONE_S = 15
START_S = 300
STOP_S = 60
REFUSED_S = 420
TOKEN = "sesame-7c20"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


class Embedded(Sidecar):
    """The private sidecar of an engine, as far as it can be seen from outside: its HTTP address. It wants a token."""

    def __init__(self) -> None:
        super().__init__(name="embedded")

    def get(self, path: str) -> Any:
        return rest.call("GET", self.url + path, headers=AUTHORIZED)

    def post(self, path: str, body: Any) -> Any:
        return rest.call("POST", self.url + path, body, AUTHORIZED)

    def pids(self) -> list[int]:
        """Processes that serve on this address."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
                except OSError:
                    continue
                if alive and b"--until-stdin-closes" in words and f"127.0.0.1:{self.port}".encode() in words:
                    found.append(int(entry.name))
        return found


@pytest.fixture
def sidecar() -> Embedded:
    return Embedded()


@pytest.fixture
def vllm(sidecar: Embedded, tmp_path: Path) -> Iterator[VllmServer]:
    """vLLM with an embedded sidecar; not started. Its log is the sidecar's, too."""
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    listen = {"listen": f"127.0.0.1:{sidecar.port}", "token_file": str(token)}
    transfer = greenroom_transfer_config(ENTRY_POINT, memory="256MiB", **listen, **PATIENT)
    with_sidecar = VllmServer(STOCK, transfer, "embedded")
    try:
        yield with_sidecar
    finally:
        with_sidecar.__exit__()
    if with_sidecar.log.exists():
        assert our_lines(with_sidecar.log.read_text(errors="replace")), "the search finds no line to search"
    assert not with_sidecar.wrongly_said(TOKEN)


def test_vllm_brings_its_own_sidecar(engines: Engines, vllm: VllmServer, sidecar: Embedded) -> None:
    ask = steps.agent("embedded", 20)
    vllm.launch()
    expected = steps.right(engines, ask)
    vllm.wait_ready()
    steps.wait_connected(sidecar)
    assert len(sidecar.pids()) == 1
    assert sidecar.get("/v1/status")["tiers"]["host"]["arena_bytes"] == 256 << 20
    assert rest.raw("GET", sidecar.url + "/v1/status")[0] == 401, "without the token"

    assert vllm.ask(ask).cached_tokens == 0
    wait_until("saving", lambda: steps.blocks_on(sidecar, "embedded", "host") >= 20, steps.SAVED_S)
    flood(vllm, 3)
    before = vllm.metrics().sum("vllm:greenroom_demand_blocks_total")
    answer = vllm.ask(ask)
    assert answer.cached_tokens == 20 * steps.BLOCK
    assert [answer.tokens] == expected
    figures = vllm.metrics()
    assert figures.sum("vllm:greenroom_saved_blocks_total") >= 20
    assert figures.sum("vllm:greenroom_demand_blocks_total") - before == 20
    assert figures.sum("vllm:greenroom_ready") == 1

    # It ends with vLLM, and stands in nobody's way while a session waits.
    sidecar.post("/v1/sessions/embedded/tool_start", {"tool": "bash"})
    assert vllm.stop(STOP_S) == 0
    wait_until("the end of the embedded sidecar", lambda: not sidecar.pids(), GONE_S)


def test_a_killed_vllm_takes_its_sidecar_along(vllm: VllmServer, sidecar: Embedded) -> None:
    vllm.launch()
    assert vllm.process is not None
    wait_until("the embedded sidecar", lambda: len(sidecar.pids()) == 1, START_S)
    assert vllm.process.running(), vllm.process.log_tail()
    vllm.kill()
    wait_until("the end of the embedded sidecar", lambda: not sidecar.pids(), GONE_S)


REFUSALS: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "prefix-caching-off": (
        {},
        ("--no-enable-prefix-caching",),
        "prefix caching is off and Greenroom hands KV to vLLM",
    ),
    "role": (
        {"kv_role": "kv_producer"},
        (),
        "kv_role is kv_producer and Greenroom both saves and loads: set it to kv_both",
    ),
    "unknown-key": (
        {"kv_connector_extra_config": {"memroy": "1GiB"}},
        (),
        "unknown key 'memroy' in kv_connector_extra_config",
    ),
}
"""Changes of the configuration, flags, and the sentence that vLLM ends with."""


def test_what_cannot_work_is_refused_in_one_sentence(engines: Engines) -> None:
    """All at once: each start takes its time."""
    assert engines is not None, "their logs are shown if this fails"
    servers = {}
    try:
        for name, (changed, args, _) in REFUSALS.items():
            config = dataclasses.replace(PLAIN, args=args)
            servers[name] = VllmServer(config, {**greenroom_transfer_config(memory="64MiB"), **changed}, name)
            servers[name].launch()
        for name, server in servers.items():
            assert server.process is not None
            assert server.process.wait(REFUSED_S) not in (0, -signal.SIGKILL), name
            log = server.log.read_text(errors="replace")
            assert REFUSALS[name][2] in log, server.process.log_tail()
    finally:
        for server in servers.values():
            server.__exit__()
    assert not [said for server in servers.values() for said in server.wrongly_said()]
