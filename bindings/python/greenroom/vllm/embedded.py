"""The embedded sidecar: a private ``greenroom serve`` for one engine.

Whichever process of the engine comes first starts it, under a lock file; the others find its socket. It ends when the
pipe to its standard input closes, that is with the process that started it, however that process ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import socket as sockets
import stat
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from greenroom.errors import ConfigError
from greenroom.vllm.settings import Settings

START_TIMEOUT_S = 30.0
"""How long a sidecar may take to answer on its socket: a machine that starts vLLM is busy."""
STOP_TIMEOUT_S = 10.0
"""How long it may take to end once its pipe is closed."""
POLL_S = 0.02
PATH_BYTES_MAX = 100
"""A Unix socket's path is limited to 107 bytes."""
ENVIRONMENT = ("HOME", "LANG", "LC_ALL", "PATH", "TMPDIR", "TZ", "XDG_RUNTIME_DIR")
"""What the sidecar gets of vLLM's environment."""

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_log = logging.getLogger("vllm.greenroom")


def command() -> str:
    """The ``greenroom`` executable: the one installed with this package, else the one on ``PATH``.

    Raises:
        ConfigError: there is none.
    """
    beside = Path(sysconfig.get_path("scripts")) / "greenroom"
    if os.access(beside, os.X_OK):
        return str(beside)
    found = shutil.which("greenroom")
    if found is None:
        raise ConfigError("config", f"the greenroom command is neither at {beside} nor on PATH: install the wheel")
    return found


def runtime_dir() -> Path:
    """A directory of this user that nobody else may enter.

    Raises:
        ConfigError: somebody else owns it, or may enter it.
    """
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{os.getuid()}"):
        if parent and os.path.isdir(parent) and os.access(parent, os.W_OK):
            path = Path(parent) / "greenroom"
            break
    else:
        path = Path(tempfile.gettempdir()) / f"greenroom-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError("config", f"{path} must be a directory of this user with mode 0700")
    return path


def socket_path(engine_id: str) -> Path:
    """Where the sidecar of this engine listens: the same answer in all of the engine's processes.

    Raises:
        ConfigError: see ``runtime_dir``.
    """
    name = engine_id if _SAFE_ID.fullmatch(engine_id) else hashlib.sha256(engine_id.encode()).hexdigest()[:16]
    path = runtime_dir() / f"greenroom-{name}.sock"
    if len(os.fsencode(path)) > PATH_BYTES_MAX:
        raise ConfigError("config", f"the socket path {path} is too long: set XDG_RUNTIME_DIR to a shorter directory")
    return path


def answers(path: Path) -> bool:
    """Whether somebody listens on the socket."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


def _lock_of(path: Path) -> Path:
    return path.with_suffix(".lock")


@contextmanager
def _locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock file, which may be swept away while this process waits for it. False: held by others."""
    while True:
        with open(path, "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            try:
                swept = os.stat(path).st_ino != os.fstat(lock.fileno()).st_ino
            except FileNotFoundError:
                swept = True
            if not swept:
                yield True
                return


def _spawn(argv: list[str]) -> subprocess.Popen[bytes]:
    """Starts a process that does not inherit what vLLM's CPU worker does to itself.

    That worker pins its main thread to one CPU and computes on it, and its environment preloads an OpenMP library that
    would pin any child to the same one: there the sidecar would starve.
    """
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    started: list[subprocess.Popen[bytes]] = []
    failed: list[OSError] = []

    def run() -> None:
        # Affinity belongs to the thread and is inherited: widening this one leaves the caller's as it is.
        try:
            if len(os.sched_getaffinity(0)) == 1:
                os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
        except OSError as error:
            _log.info("Greenroom: the sidecar stays on this process's CPU: %s", error)
        try:
            # A session of its own: a Ctrl-C for vLLM must not end it before vLLM has ended.
            started.append(subprocess.Popen(argv, stdin=subprocess.PIPE, env=environment, start_new_session=True))
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise ConfigError("config", f"{argv[0]} cannot be started: {failed[0]}")
    return started[0]


def sweep(directory: Path) -> None:
    """Removes what sidecars left behind that were killed with their engine."""
    names = {path.stem for path in directory.glob("greenroom-*") if path.suffix in (".sock", ".lock")}
    for name in names:
        path = directory / f"{name}.sock"
        with _locked(_lock_of(path), wait=False) as held:
            if held and not answers(path):
                path.unlink(missing_ok=True)
                _lock_of(path).unlink(missing_ok=True)


class EmbeddedSidecar:
    """This process's share in the engine's private sidecar. ``close`` ends it, if this process started it."""

    def __init__(self, engine_id: str, settings: Settings) -> None:
        self.socket = socket_path(engine_id)
        self._process: subprocess.Popen[bytes] | None = None
        with _locked(_lock_of(self.socket)):
            if not answers(self.socket):
                self._start(settings)

    def _start(self, settings: Settings) -> None:
        sweep(self.socket.parent)
        argv = [command(), "serve", "--socket", str(self.socket), "--until-stdin-closes"]
        if settings.memory is not None:
            argv += ["--memory", settings.memory]
        if settings.listen is not None:
            argv += ["--listen", settings.listen]
        if settings.token_file is not None:
            argv += ["--token-file", settings.token_file]
        self._process = process = _spawn(argv)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not answers(self.socket):
            code = process.poll()
            if code is not None:
                self.close()
                raise ConfigError(
                    "config", f"the embedded sidecar ended with code {code}; its reason is in the log above"
                )
            if time.monotonic() > deadline:
                self.close()
                raise ConfigError("config", f"the embedded sidecar did not answer within {START_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
        _log.info("Greenroom: embedded sidecar %d on %s", process.pid, self.socket)

    def close(self) -> None:
        """Ends the sidecar if it is this process's; may be called again."""
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        process.stdin.close()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
