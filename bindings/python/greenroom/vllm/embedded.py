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
import time
from pathlib import Path

from greenroom.errors import ConfigError
from greenroom.vllm.settings import Settings

START_TIMEOUT_S = 30.0
"""How long a sidecar may take to answer on its socket: it registers its memory first."""
STOP_TIMEOUT_S = 10.0
"""How long it may take to end once its pipe is closed."""
POLL_S = 0.02
PATH_BYTES_MAX = 100
"""A Unix socket's path is limited to 107 bytes."""

_SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

_log = logging.getLogger("greenroom.vllm")


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


class EmbeddedSidecar:
    """This process's share in the engine's private sidecar. ``close`` ends it, if this process started it."""

    def __init__(self, engine_id: str, settings: Settings) -> None:
        self.socket = socket_path(engine_id)
        self._process: subprocess.Popen[bytes] | None = None
        with open(f"{self.socket}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not answers(self.socket):
                self._start(settings)

    def _start(self, settings: Settings) -> None:
        argv = [command(), "serve", "--socket", str(self.socket), "--until-stdin-closes"]
        if settings.memory is not None:
            argv += ["--memory", settings.memory]
        if settings.listen is not None:
            argv += ["--listen", settings.listen]
        # A session of its own: a Ctrl-C for vLLM must not end it before vLLM has ended.
        process = subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True)
        self._process = process
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
