"""The search of logs: it must find what the tests on real servers rely on it for."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.completions import Ask
from support.said import head, wrongly_said
from support.servers import VllmConfig, VllmServer

PROMPT = list(range(1000, 1020))
FINE = """\
(APIServer pid=7) INFO 11-26 15:13:14 [api_utils.py:286] args: {'model': '/home/me/models/tiny', 'port': 8000}
(EngineCore pid=8) ERROR 11-26 15:13:15 [dump_input.py:72] block_ids=([1, 2, 3, 4, 5, 6, 7, 8, 9, 10],), 1000, 1001
2026-11-26T15:14:52.124042Z  INFO sidecar::engine::client: no arena yet socket=/tmp/g/greenroom.sock error=refused (111)
"""


def found(line: str) -> list[str]:
    return wrongly_said(FINE + line + "\n", [head(PROMPT), head([5])], ["sesame"])


def test_what_logs_may_say_is_not_found() -> None:
    assert found("") == []


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (f"prompt_token_ids={PROMPT}", "a prompt"),
        (f"after another number, 7, {PROMPT[:8]}", "a prompt"),
        ("array(" + " ".join(map(str, PROMPT)) + ")", "a prompt"),
        ("token=sesame", "a token"),
        (
            "(Worker pid=9) 2026-11-26T15:14:52.1Z  WARN cuda::thread: cannot read file=/home/me/token",
            "the path /home/me",
        ),
        ("2026-11-26T15:14:52.1Z  WARN greenroom: /srv/x", "the path /srv/x"),
    ],
)
def test_what_they_must_not_say_is_found(line: str, what: str) -> None:
    (said,) = found(line)
    assert said.startswith(what)


def test_a_server_knows_what_it_was_asked(tmp_path: Path) -> None:
    server = VllmServer(VllmConfig())
    assert server.wrongly_said() == [], "it has no log yet"
    server.log = tmp_path / "server.log"
    with pytest.raises(ConnectionError):
        server.ask(Ask(PROMPT), timeout_s=5)
    server.log.write_text(f"{PROMPT} sesame\n")
    assert server.wrongly_said("sesame") == [
        f"server.log tells a prompt: {str(PROMPT)[1:81]}",
        "server.log tells a token",
    ]
