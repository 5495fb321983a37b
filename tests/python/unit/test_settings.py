"""What may stand in ``kv_connector_extra_config``, and where the embedded sidecar listens."""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from greenroom import ConfigError
from greenroom.vllm import embedded
from greenroom.vllm.settings import Settings


def test_nothing_is_needed() -> None:
    assert Settings.parse({}) == Settings()


def test_every_key_is_taken() -> None:
    extra = {
        "memory": "8GiB",
        "listen": "127.0.0.1:7411",
        "token_file": "/etc/greenroom/token",
        "lookup_wait_ms": 20,
        "gpu_hold_ratio": 1,
        "prefetch": False,
        "layout": "engine",
        "copy_method": "batch",
        "copy_sub_batch_kib": 2048,
        "force": True,
    }
    settings = Settings.parse(extra)
    assert {key: getattr(settings, key) for key in extra} == extra
    assert Settings.parse({"socket": "/run/greenroom.sock"}).socket == "/run/greenroom.sock"


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"memroy": "8GiB"}, "memroy"),
        ({"memory": 8}, "memory"),
        ({"memory": ""}, "memory"),
        ({"socket": "greenroom.sock"}, "socket"),
        ({"socket": "/s", "memory": "8GiB"}, "memory"),
        ({"socket": "/s", "listen": "127.0.0.1:1"}, "listen"),
        ({"socket": "/s", "token_file": "/t"}, "token_file"),
        ({"token_file": "/t"}, "listen"),
        ({"listen": "127.0.0.1:1", "token_file": "t"}, "token_file"),
        ({"lookup_wait_ms": -1}, "lookup_wait_ms"),
        ({"lookup_wait_ms": 10_001}, "lookup_wait_ms"),
        ({"lookup_wait_ms": True}, "lookup_wait_ms"),
        ({"lookup_wait_ms": "50"}, "lookup_wait_ms"),
        ({"gpu_hold_ratio": 1.01}, "gpu_hold_ratio"),
        ({"gpu_hold_ratio": float("nan")}, "gpu_hold_ratio"),
        ({"prefetch": "yes"}, "prefetch"),
        ({"layout": "BLNHC"}, "layout"),
        ({"copy_method": "kernel"}, "copy_method"),
        ({"copy_sub_batch_kib": 0}, "copy_sub_batch_kib"),
        ({"copy_sub_batch_kib": "4MiB"}, "copy_sub_batch_kib"),
        ({"force": 1}, "force"),
    ],
)
def test_a_wrong_key_or_value_is_named(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as raised:
        Settings.parse(extra)
    assert raised.value.code == "config"


@pytest.fixture
def private(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # Not `tmp_path`: its name leaves no room for a socket's.
    with tempfile.TemporaryDirectory(prefix="gr-") as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", path)
        yield Path(path)


def test_all_processes_of_an_engine_find_one_socket(private: Path) -> None:
    path = embedded.socket_path("5c3a-engine")
    assert path == private / "greenroom" / "greenroom-5c3a-engine.sock"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert embedded.socket_path("5c3a-engine") == path


def test_by_default_nobody_else_can_reach_it(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = private / "said"
    fake_sidecar(private, monkeypatch, LISTENING + f'"{said}"')
    embedded.EmbeddedSidecar("engine", Settings()).close()
    words = said.read_text().split()
    assert "--until-stdin-closes" in words
    assert "--listen" not in words, "no HTTP unless it is asked for"
    socket_at = Path(words[words.index("--socket") + 1])
    assert socket_at.parent.stat().st_mode & 0o777 == 0o700


def test_an_engine_id_never_leaves_the_directory(private: Path) -> None:
    odd = {embedded.socket_path(name) for name in ("../../etc/x", "a/b", "x" * 300, "", "ü", "a\0b")}
    assert len(odd) == 6
    assert {path.parent for path in odd} == {private / "greenroom"}


def test_a_directory_that_others_may_enter_is_refused(private: Path) -> None:
    (private / "greenroom").mkdir(mode=0o755)
    os.chmod(private / "greenroom", 0o755)
    with pytest.raises(ConfigError, match="0700"):
        embedded.socket_path("engine")


def test_a_link_in_place_of_the_directory_is_refused(private: Path) -> None:
    (private / "elsewhere").mkdir(mode=0o700)
    (private / "greenroom").symlink_to(private / "elsewhere")
    with pytest.raises(ConfigError, match="directory of this user"):
        embedded.socket_path("engine")


def test_a_path_that_no_socket_can_have_is_refused(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = private / ("d" * 90)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(ConfigError, match="too long"):
        embedded.socket_path("engine")


def fake_sidecar(private: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Puts a shell script in the place of the greenroom command."""
    script = private / "greenroom-command"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o700)
    monkeypatch.setattr(embedded, "command", lambda: str(script))


LISTENING = """exec python3 -c '
import socket, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[sys.argv.index("--socket") + 1])
listener.listen()
open(sys.argv[-1], "w").write(" ".join(sys.argv[1:]))
sys.stdin.read()
' "$@" """


def test_the_first_process_starts_it_and_the_others_use_it(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = private / "said"
    fake_sidecar(private, monkeypatch, LISTENING + f'"{said}"')
    settings = Settings(memory="1GiB", listen="127.0.0.1:0", token_file="/token")
    first = embedded.EmbeddedSidecar("engine", settings)
    second = embedded.EmbeddedSidecar("engine", Settings(memory="1GiB"))
    try:
        assert second.socket == first.socket
        second.close()
        with socket.socket(socket.AF_UNIX) as still_there:
            still_there.connect(str(first.socket))
        assert said.read_text().startswith(
            f"serve --socket {first.socket} --until-stdin-closes --memory 1GiB --listen 127.0.0.1:0 --token-file /token"
        )
    finally:
        first.close()
    assert not embedded.answers(first.socket)


def test_a_sidecar_that_cannot_start_says_so(private: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sidecar(private, monkeypatch, "exit 2")
    with pytest.raises(ConfigError, match="code 2"):
        embedded.EmbeddedSidecar("engine", Settings())


def test_what_a_killed_engine_left_is_swept_and_what_is_in_use_stays(
    private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sidecar(private, monkeypatch, LISTENING + f'"{private / "said"}"')
    first = embedded.EmbeddedSidecar("in-use", Settings())
    try:
        left = embedded.socket_path("killed")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(left))
        starting = embedded.socket_path("starting")
        starting.touch()
        with embedded._locked(embedded._lock_of(starting)):
            embedded.sweep(left.parent)
            assert sorted(path.name for path in left.parent.iterdir()) == [
                "greenroom-in-use.lock",
                "greenroom-in-use.sock",
                "greenroom-starting.lock",
                "greenroom-starting.sock",
            ]
    finally:
        first.close()


def test_a_lock_that_was_swept_away_is_taken_anew(private: Path) -> None:
    lock = embedded._lock_of(embedded.socket_path("engine"))
    with embedded._locked(lock) as held:
        assert held
        lock.unlink()
        with embedded._locked(lock) as second:
            assert second
            with embedded._locked(lock, wait=False) as third:
                assert not third


def test_the_sidecar_inherits_neither_the_workers_cpu_nor_its_environment(
    private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM's CPU worker is pinned to one CPU and preloads a library that pins whatever it is loaded into."""
    if len(os.sched_getaffinity(os.getppid())) == 1:
        pytest.skip("this machine has one CPU")
    monkeypatch.setenv("GOMP_CPU_AFFINITY", "0")
    monkeypatch.setenv("LD_PRELOAD", "/nowhere/libgomp.so")
    found: list[str] = []

    def pinned() -> None:
        # Affinity belongs to the thread: the test's own stays.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        process = embedded._spawn(["sh", "-c", "grep Cpus_allowed_list /proc/self/status; env; read wait"])
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() in (0, 1)
        found.append("ran")

    output = private / "output"
    monkeypatch.setattr(subprocess, "Popen", _into(output))
    thread = threading.Thread(target=pinned)
    thread.start()
    thread.join()
    assert found == ["ran"]
    text = output.read_text()
    assert "GOMP_CPU_AFFINITY" not in text
    assert "LD_PRELOAD" not in text
    assert f"XDG_RUNTIME_DIR={private}" in text
    cpus = text.partition("Cpus_allowed_list:")[2].split()[0]
    assert "," in cpus or "-" in cpus


def _into(path: Path) -> Callable[..., subprocess.Popen[bytes]]:
    """A ``Popen`` that writes to a file."""
    real = subprocess.Popen

    def spawn(argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
        with open(path, "wb") as output:
            return real(argv, stdout=output, **options)

    return spawn
