"""``kv_connector_extra_config`` as a checked value. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, NoReturn, get_args

from greenroom.errors import ConfigError

Layout = Literal["auto", "engine"]
CopyMethod = Literal["auto", "single", "batch", "rows"]

LOOKUP_WAIT_MS_MAX = 10_000
COPY_SUB_BATCH_KIB_MAX = 1 << 20


@dataclass(frozen=True)
class Settings:
    """What a user may say about Greenroom in ``--kv-transfer-config``."""

    memory: str | None = None
    """Size of the embedded sidecar's arena, such as ``8GiB``; left out: the sidecar's own default."""
    socket: str | None = None
    """Socket of a running sidecar; left out: an embedded one is started."""
    listen: str | None = None
    """HTTP address of the embedded sidecar; left out: it has none."""
    token_file: str | None = None
    """File with the token that its HTTP clients must send; left out: every user of this machine may call it."""
    lookup_wait_ms: int = 50
    """How long a request may wait for the sidecar's answer before it counts as a miss."""
    gpu_hold_ratio: float = 0.3
    """Share of vLLM's pool that waiting sessions may be held in."""
    prefetch: bool = True
    """Whether KV is brought back before the request; off, it comes back with it."""
    layout: Layout = "auto"
    """``auto`` asks vLLM for a block-outermost KV layout on CUDA; ``engine`` leaves the choice to vLLM."""
    copy_method: CopyMethod = "auto"
    """How copies are put to a CUDA driver: ``auto`` takes what suits their sizes; the others force one way."""
    copy_sub_batch_kib: int | None = None
    """KiB that copies go in: what vLLM's own small copies wait for, twice; left out: what suits the link."""
    force: bool = False
    """Start on a vLLM release that Greenroom has not been tested with."""

    @classmethod
    def parse(cls, extra: Mapping[str, Any]) -> Settings:
        """Checks every key and value.

        Raises:
            ConfigError: names the key and says what it should be.
        """
        known = {field.name for field in fields(cls)}
        for key in extra:
            if key not in known:
                _refuse(f"unknown key {key!r} in kv_connector_extra_config; known keys: {', '.join(sorted(known))}")
        for key in ("memory", "socket", "listen", "token_file"):
            if key in extra and not (isinstance(extra[key], str) and extra[key]):
                _refuse(f"{key} must be a string that is not empty, not {extra[key]!r}")
        for key in ("prefetch", "force"):
            if key in extra and not isinstance(extra[key], bool):
                _refuse(f"{key} must be true or false, not {extra[key]!r}")
        settings = cls(**extra)
        settings._check_numbers()
        if settings.layout not in ("auto", "engine"):
            _refuse(f"layout must be auto or engine, not {settings.layout!r}")
        if settings.copy_method not in get_args(CopyMethod):
            _refuse(f"copy_method must be one of {', '.join(get_args(CopyMethod))}, not {settings.copy_method!r}")
        if settings.socket is not None:
            for key in ("memory", "listen", "token_file"):
                if getattr(settings, key) is not None:
                    _refuse(f"{key} belongs to an embedded sidecar and socket names a running one: give one of the two")
            if not settings.socket.startswith("/"):
                _refuse(f"socket must be an absolute path, not {settings.socket!r}")
        if settings.token_file is not None:
            if settings.listen is None:
                _refuse("token_file guards the HTTP address: give listen as well")
            if not settings.token_file.startswith("/"):
                _refuse(f"token_file must be an absolute path, not {settings.token_file!r}")
        return settings

    def _check_numbers(self) -> None:
        wait, ratio, size = self.lookup_wait_ms, self.gpu_hold_ratio, self.copy_sub_batch_kib
        if not isinstance(wait, int) or isinstance(wait, bool) or not 0 <= wait <= LOOKUP_WAIT_MS_MAX:
            _refuse(f"lookup_wait_ms must be a whole number from 0 to {LOOKUP_WAIT_MS_MAX}, not {wait!r}")
        if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 0 <= ratio <= 1:
            _refuse(f"gpu_hold_ratio must be a number from 0 to 1, not {ratio!r}")
        whole = isinstance(size, int) and not isinstance(size, bool)
        if size is not None and not (whole and 1 <= size <= COPY_SUB_BATCH_KIB_MAX):
            _refuse(f"copy_sub_batch_kib must be a whole number from 1 to {COPY_SUB_BATCH_KIB_MAX}, not {size!r}")


@dataclass(frozen=True)
class EngineConfig:
    """One engine and its connection to the sidecar: what the native module is given. Equal in all its processes."""

    socket: str
    engine_id: str
    rank_bytes: int
    """Bytes of one block on one rank, all layers."""
    ranks: int
    block_tokens: int
    gpu_blocks: int
    lookup_wait_ms: int
    gpu_hold_ratio: float
    prefetch: bool
    copy_method: CopyMethod = "auto"
    copy_sub_batch_kib: int | None = None


@dataclass(frozen=True)
class KvMemory:
    """Where one worker's blocks lie: what the native module is given."""

    cuda_device: int | None
    """The number of the CUDA device; None: in host memory."""
    regions: list[tuple[int, int, int]]
    """(Address of block 0, bytes from one block to the next, bytes of a block) of each region."""
    owner: object
    """Keeps the memory allocated."""


def _refuse(message: str) -> NoReturn:
    raise ConfigError("config", message)
