from collections.abc import Callable, Sequence
from typing import Literal, Protocol, final

__all__ = ["GROWTH_BLOCKS", "Mover", "SchedulerHooks", "__version__"]

GROWTH_BLOCKS: int
"""Most blocks by which one request is taken to grow: see ``SchedulerHooks.match_prefix``."""
__version__: str

class _EngineConfig(Protocol):
    """See ``greenroom.vllm.settings.EngineConfig``."""

    @property
    def socket(self) -> str: ...
    @property
    def engine_id(self) -> str: ...
    @property
    def rank_bytes(self) -> int: ...
    @property
    def ranks(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def gpu_blocks(self) -> int: ...
    @property
    def lookup_wait_ms(self) -> int: ...
    @property
    def gpu_hold_ratio(self) -> float: ...
    @property
    def copy_method(self) -> str: ...
    @property
    def copy_sub_batch_kib(self) -> int | None: ...
    @property
    def prefetch(self) -> bool: ...

class _KvMemory(Protocol):
    """See ``greenroom.vllm.settings.KvMemory``."""

    @property
    def cuda_device(self) -> int | None: ...
    @property
    def regions(self) -> Sequence[tuple[int, int, int]]: ...
    @property
    def owner(self) -> object: ...

class _GpuPool(Protocol):
    """See ``greenroom.vllm.compat.GpuPool``. Called only from within ``plan`` and ``copies_done``."""

    def total(self) -> int: ...
    def free(self) -> int: ...
    def lookup(self, hashes: Sequence[bytes], /) -> Sequence[int | None]: ...
    def uses(self, blocks: Sequence[int], /) -> Sequence[tuple[bytes | None, bool]]: ...
    def free_list(self, count: int, /) -> Sequence[bytes | None]: ...
    def take(self, count: int, /) -> Sequence[int] | None: ...
    def reference(self, blocks: Sequence[int], /) -> None: ...
    def release(self, blocks: Sequence[int], /) -> None: ...
    def evict(self, blocks: Sequence[int], /) -> None: ...
    def publish(self, entries: Sequence[tuple[int, bytes, int]], /) -> None: ...

@final
class SchedulerHooks:
    """What an engine's scheduler tells Greenroom. No method waits for the sidecar.

    Block hashes are passed as one ``bytes``, 32 bytes for each. After ``close`` every method raises ``Unavailable``,
    but for those that answer a bool: they say False.
    """

    def __new__(cls, config: _EngineConfig, wake: Callable[[], object] | None = None) -> SchedulerHooks:
        """Connects in the background. ``wake`` is called on another thread when the engine should step.

        Raises:
            ConfigError: a field is out of range.
            Unavailable: the system gives no thread.
        """

    def open_namespace(self, material: bytes) -> None:
        """Everything besides the block hash that decides a block's bytes. Nothing is saved or loaded before."""

    def has_namespace(self) -> bool:
        """Whether the namespace is open."""

    def turn_started(self, request: str, identity: str | None, hashes: bytes) -> None:
        """A request was enqueued; ``hashes`` are the full blocks of its prompt."""

    def hints(self, json: str) -> None:
        """A request carried a hint envelope."""

    def match_prefix(
        self, request: str, local_blocks: int, blocks_max: int, holders: tuple[int, int, int, int, int]
    ) -> int | None:
        """How many blocks beyond ``local_blocks`` can be loaded; None: not known yet, or no room, ask again at the next
        step. ``holders``, the requests that hold blocks: how many, how many may, what they still need, how far they and
        this one are taken to grow, what is free."""

    def swap_in(self, request: str, gpu_blocks: Sequence[int]) -> None:
        """The blocks that were allocated for what ``match_prefix`` offered; none: the request starts without them."""

    def blocks_filled(self, request: str, full: int, new: bytes) -> None:
        """A running request has ``full`` full blocks, the last of which are ``new``."""

    def turn_ended(self, request: str, hashes: bytes) -> None:
        """A request ended and leaves these full blocks."""

    def plan(
        self, pool: _GpuPool, reserve: int, handed_out: int, activity: Literal["busy", "idle", "paused"]
    ) -> bytes | None:
        """One engine step; what the workers have to do in it, or None."""

    def copies_done(self, pool: _GpuPool, report: bytes) -> list[str]:
        """One rank's report; the requests whose load has ended with it.

        Raises:
            ProtocolError: the worker runs another release of Greenroom.
        """

    def reset(self) -> None:
        """The engine resets its cache: nothing from before may ever be read again."""

    def pending(self, paused: bool) -> bool:
        """Whether the engine must keep stepping; paused, only for copies that run."""

    def copies_in_flight(self) -> bool:
        """Whether copies are running."""

    def holds_references(self) -> bool:
        """Whether blocks become free when running copies end."""

    def figures(self) -> dict[str, int]:
        """Totals since the hooks were made."""

    def close(self) -> None:
        """Ends the connection; may be called again."""

@final
class Mover:
    """One worker's copies. Methods are called on the worker's own thread."""

    def __new__(cls, config: _EngineConfig, rank: int, memory: _KvMemory) -> Mover:
        """Connects in the background; on a CUDA device waits some seconds for the sidecar, to register its memory.

        The addresses are trusted: they must stay valid as long as the memory's owner lives.

        Raises:
            ConfigError: the regions contradict the configuration, or CUDA cannot be used; the message says why.
            Unavailable: the system gives no thread, or the driver failed a call.
        """

    def step(self, plan: bytes, stream: int) -> None:
        """Once per step, before it computes: ends fenced copies, gives up cancelled ones, starts this plan's loads and
        the saves of the plan before. An empty plan is one with nothing in it.

        ``stream`` is the handle of the compute stream, of which copies wait for what is on it; 0 for the default one.

        Raises:
            ProtocolError: the scheduler runs another release of Greenroom.
        """

    def report(self) -> bytes | None:
        """What has ended since the last call."""

    def invalid_blocks(self) -> set[int]:
        """Blocks of failed loads, of what was reported since the last call."""

    def in_flight(self) -> int:
        """Jobs that have not ended."""

    def close(self) -> None:
        """Waits for running copies and ends; may be called again."""
