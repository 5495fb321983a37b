"""The two kinds of servers under test, as context managers: Greenroom's sidecar and vLLM."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from support import rest
from support.completions import MODEL_NAME, Ask, Completion, Stream, complete
from support.make_model import PRESETS, SKELETONS, make_model, make_skeleton
from support.metrics import Metrics
from support.paths import LOGS, MODELS, greenroom_binary, python_of
from support.process import Process, ProcessFailed, free_port
from support.said import Head, head, wrongly_said

GPU_HITS = "vllm:prefix_cache_hits_total"
SIDECAR_START_S = 60
"""A machine that starts vLLM beside it is busy."""
VLLM_START_S = 420
PROGRESS_EVERY_S = 15

Say = Callable[[str], None]


def silent(_: str) -> None:
    """Says nothing."""


def wait_ready(process: Process, url: str, timeout_s: float, name: str, say: Say = silent) -> None:
    """Waits for `url` to answer 2xx, telling how it goes; the log is in the message when it does not."""
    start = time.monotonic()
    told = start
    while not rest.is_up(url):
        now = time.monotonic()
        if not process.running():
            raise ProcessFailed(f"{name} ended with {process.returncode()} while starting\n{process.log_tail()}")
        if now - start > timeout_s:
            raise ProcessFailed(f"{name} was not ready within {timeout_s:g} s\n{process.log_tail()}")
        if now - told > PROGRESS_EVERY_S:
            told = now
            say(f"  … {name} is starting, {now - start:.0f} s")
        time.sleep(0.1)
    say(f"  {name} is ready after {time.monotonic() - start:.1f} s")


class Sidecar:
    """`greenroom serve` on a private socket and a free port. The socket and the port stay the same over restarts."""

    def __init__(self, memory: str = "1GiB", flags: tuple[str, ...] = (), name: str = "sidecar") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="greenroom-")
        self.socket = Path(self._folder.name) / "greenroom.sock"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = LOGS / f"{name}-{self.port}.log"
        self.memory = memory
        self._name = name
        self._command = [
            str(greenroom_binary()),
            "serve",
            "--memory",
            memory,
            "--socket",
            str(self.socket),
            "--listen",
            f"127.0.0.1:{self.port}",
            *flags,
        ]
        self.process: Process | None = None

    def __enter__(self) -> Sidecar:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill_group()
        self._folder.cleanup()

    def start(self, wait: Say = silent) -> None:
        """Starts it and waits until it is healthy."""
        self.process = Process(self._command, self.log)
        wait_ready(self.process, self.url + "/healthz", SIDECAR_START_S, self._name, wait)

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None, "the sidecar was never started"
        self.process.kill_group()

    def stop(self, timeout_s: float = 15) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None, "the sidecar was never started"
        return self.process.terminate(timeout_s)

    def restart(self, memory: str) -> None:
        """Ends it and starts it with an arena of this size; its engines connect again by themselves."""
        self.stop()
        self.memory = memory
        self._command[self._command.index("--memory") + 1] = memory
        self.start()

    def get(self, path: str) -> Any:
        return rest.call("GET", self.url + path)

    def post(self, path: str, body: Any) -> Any:
        return rest.call("POST", self.url + path, body)

    def metrics(self) -> Metrics:
        return Metrics(rest.text("GET", self.url + "/metrics"))

    def session(self, name: str) -> dict[str, Any] | None:
        """`GET /v1/sessions/{name}`; None while it is unknown."""
        try:
            answer: dict[str, Any] = self.get(f"/v1/sessions/{name}")
        except rest.HttpError as error:
            if error.status == 404:
                return None
            raise
        return answer


@dataclasses.dataclass(frozen=True)
class Connector:
    """The class that vLLM is told to use. Without a module vLLM finds it through Greenroom's plugin entry point."""

    name: str = "GreenroomConnector"
    module: str | None = "greenroom.vllm"


@dataclasses.dataclass(frozen=True)
class Cuda:
    """How an engine runs on a CUDA device: decoding in graphs, and without torch.compile, which would take a minute."""

    memory_share: float = 0.35
    """Of the device; must be free when the engine starts. Two engines that are compared share one device."""
    pool_bytes: int = 1 << 30
    """Said only so that vLLM does not measure: another engine that starts meanwhile makes that fail. The size of the
    pool is `gpu_blocks`."""
    graph_sizes: tuple[int, ...] = (1, 2, 4, 8, 16)

    def flags(self) -> list[str]:
        graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": self.graph_sizes}
        return [
            "--gpu-memory-utilization",
            str(self.memory_share),
            "--kv-cache-memory-bytes",
            str(self.pool_bytes),
            "--compilation-config",
            json.dumps(graphs),
        ]


@dataclasses.dataclass(frozen=True)
class VllmConfig:
    """What distinguishes one engine from another; hashable, so that tests can share engines by it."""

    version: str = "0.32"
    model: str = "tiny"
    gpu_blocks: int = 400
    block_size: int = 32
    max_model_len: int = 8192
    max_num_seqs: int = 16
    dev_mode: bool = True
    cuda: Cuda | None = None
    """None: it computes on the CPU."""
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    connector: Connector = Connector()
    """Of an engine with Greenroom: for tests that look over its shoulder."""


def greenroom_transfer_config(connector: Connector = Connector(), **extra: Any) -> dict[str, Any]:
    """The value of `--kv-transfer-config`, as the README gives it."""
    module = {} if connector.module is None else {"kv_connector_module_path": connector.module}
    return {
        "kv_connector": connector.name,
        **module,
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }


def last_core() -> int:
    """The core that `compute_cores` leaves out, where there is more than one."""
    return max(os.sched_getaffinity(0))


def compute_cores() -> str:
    """All cores but the last, which is left to vLLM's scheduler and front end: what stock vLLM chooses by itself.

    With a connector of any kind vLLM's CPU build reserves one core more, and on a machine of two then none at all: its
    compute threads fight with its scheduler. Servers that are compared must not differ in that.
    """
    cores = sorted(os.sched_getaffinity(0))
    return ",".join(map(str, cores[:-1] or cores))


def model_folder(model: str) -> Path:
    """The folder of a preset, made if need be, or the folder that the name is."""
    if model in PRESETS:
        return make_model(MODELS / model, PRESETS[model])
    if model in SKELETONS:
        return make_skeleton(MODELS / model, SKELETONS[model])
    return Path(model)


class VllmServer:
    """vLLM's OpenAI server, without a connector unless `transfer` is given."""

    def __init__(self, config: VllmConfig, transfer: Mapping[str, Any] | None = None, name: str = "vllm") -> None:
        self.config = config
        self._transfer = transfer
        self._name = name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = LOGS / f"{name}-{self.port}.log"
        # A port may have been another run's.
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        self._heads: set[Head] = set()
        self.process: Process | None = None

    def __enter__(self) -> VllmServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None:
            self.process.kill_group()

    def command(self) -> list[str]:
        config = self.config
        command = [str(python_of(config.version)), "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(model_folder(config.model)), "--served-model-name", MODEL_NAME]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--enable-prompt-tokens-details",
        ]
        command += ["--enforce-eager"] if config.cuda is None else config.cuda.flags()
        command += ["--block-size", str(config.block_size), "--num-gpu-blocks-override", str(config.gpu_blocks)]
        command += ["--max-model-len", str(config.max_model_len), "--max-num-seqs", str(config.max_num_seqs)]
        if config.model in PRESETS:
            # vLLM's own choice for a float32 model is bfloat16, whose noise changes tokens.
            command += ["--dtype", PRESETS[config.model].dtype]
        if config.model in SKELETONS:
            command += ["--load-format", "dummy"]
        if self._transfer is not None:
            command += ["--kv-transfer-config", json.dumps(self._transfer)]
        return command + list(config.args)

    def environment(self) -> dict[str, str]:
        env = dict(os.environ)
        env.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", DO_NOT_TRACK="1")
        # 0.26 seeds its block hashes from this; without it nothing matches after a restart.
        env.setdefault("PYTHONHASHSEED", "0")
        if self.config.cuda is None:
            env["VLLM_CPU_KVCACHE_SPACE"] = "1"
            env.setdefault("VLLM_CPU_OMP_THREADS_BIND", compute_cores())
        if self.config.dev_mode:
            env["VLLM_SERVER_DEV_MODE"] = "1"
        env.update(self.config.env)
        return env

    def launch(self) -> None:
        """Starts the process and does not wait: `wait_ready` does."""
        # Not in the checkout: `python -m` puts the current folder first on the import path.
        LOGS.mkdir(parents=True, exist_ok=True)
        self.process = Process(self.command(), self.log, self.environment(), cwd=LOGS)

    def wait_ready(self, say: Say = silent) -> None:
        assert self.process is not None, "launch() comes first"
        wait_ready(self.process, self.url + "/health", VLLM_START_S, self._name, say)

    def start(self, say: Say = silent) -> None:
        self.launch()
        self.wait_ready(say)

    def kill(self) -> None:
        """kill -9 for the API server, EngineCore and worker at once."""
        assert self.process is not None, "the server was never started"
        self.process.kill_group()

    def stop(self, timeout_s: float = 60) -> int:
        """SIGTERM; the exit status."""
        assert self.process is not None, "the server was never started"
        return self.process.terminate(timeout_s)

    def signal_member(self, title: str, number: int = signal.SIGKILL) -> int:
        """Signals the one process whose title contains `title` (`EngineCore`, `Worker`); returns its pid."""
        assert self.process is not None, "the server was never started"
        pids = [member.pid for member in self.process.members() if title in member.title]
        assert len(pids) == 1, f"{len(pids)} processes are called {title}: {[m.title for m in self.process.members()]}"
        os.kill(pids[0], number)
        return pids[0]

    def ask(self, ask: Ask, timeout_s: float = 300) -> Completion:
        self._heads.add(head(ask.prompt))
        return complete(self.url, ask, timeout_s)

    def ask_at_once(self, prompts: Sequence[Sequence[int]], max_tokens: int, timeout_s: float = 300) -> None:
        """All in one request, of no session: vLLM's scheduler has them all before it has computed the first."""
        self._heads.update(map(head, prompts))
        body = {
            "model": MODEL_NAME,
            "prompt": [list(prompt) for prompt in prompts],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }
        rest.call("POST", self.url + "/v1/completions", body, timeout_s=timeout_s)

    def stream(self, ask: Ask, timeout_s: float = 300) -> Stream:
        self._heads.add(head(ask.prompt))
        return Stream(self.url, ask, timeout_s)

    def wrongly_said(self, *secrets: str) -> list[str]:
        """What its log tells of prompts, of these secrets and of places; to be asked when it has ended."""
        if not self.log.exists():
            return []
        log = self.log.read_bytes()[self._log_start :].decode(errors="replace")
        return [f"{self.log.name} tells {what}" for what in wrongly_said(log, self._heads, secrets)]

    def healthy(self) -> bool:
        return rest.is_up(self.url + "/health")

    def metrics(self) -> Metrics:
        return Metrics(rest.text("GET", self.url + "/metrics"))

    def loaded(self) -> int:
        """Tokens that requests themselves had to load: found in the arena and not on the GPU."""
        return int(self.metrics().sum("vllm:external_prefix_cache_hits_total"))

    def brought_back(self) -> int:
        """Blocks that were loaded ahead of their requests."""
        return int(self.metrics().sum("vllm:greenroom_prefetch_blocks_total"))

    def found_on_gpu(self) -> int:
        """Tokens that requests found on the GPU."""
        metrics = self.metrics()
        assert GPU_HITS in metrics.names(), f"this vLLM has no {GPU_HITS}"
        return int(metrics.sum(GPU_HITS))

    def preemptions(self) -> int:
        return int(self.metrics().sum("vllm:num_preemptions_total"))

    def reset_prefix_cache(self, reset_external: bool = False) -> bool:
        """Development endpoint. With `reset_external` Greenroom's KV is dropped too. Whether vLLM says it worked."""
        query = "?reset_external=true" if reset_external else ""
        answer = rest.call("POST", self.url + "/reset_prefix_cache" + query)
        # 0.26 answers with an empty body.
        return True if answer is None else bool(answer["success"])

    def pause(self, mode: str = "abort", clear_cache: bool = True) -> None:
        """`clear_cache`: all KV is dropped, Greenroom's too; vLLM's mode `keep` never does that."""
        rest.call("POST", self.url + f"/pause?mode={mode}&clear_cache={str(clear_cache).lower()}")

    def resume(self) -> None:
        rest.call("POST", self.url + "/resume")

    def sleep(self, level: int = 1) -> None:
        """Needs `--enable-sleep-mode` in `args`."""
        rest.call("POST", self.url + f"/sleep?level={level}")

    def wake_up(self) -> None:
        rest.call("POST", self.url + "/wake_up")


@dataclasses.dataclass
class Rig:
    """vLLM with Greenroom: the server and the sidecar it is connected to."""

    vllm: VllmServer
    sidecar: Sidecar


@contextlib.contextmanager
def rig(
    config: VllmConfig, memory: str = "1GiB", name: str = "vllm", kind: type[Sidecar] = Sidecar, **extra: Any
) -> Iterator[Rig]:
    """A sidecar of its own and a vLLM that will use it: launched and not waited for. `extra` goes into the connector's
    configuration."""
    with kind(memory) as sidecar:
        transfer = greenroom_transfer_config(config.connector, socket=str(sidecar.socket), **extra)
        with contextlib.ExitStack() as stack:
            vllm = VllmServer(config, transfer, name)
            stack.push(vllm.__exit__)
            vllm.launch()
            yield Rig(vllm, sidecar)


def vllm_version(version: str) -> str:
    """The exact version that is installed."""
    names = ("vllm", "vllm-cpu")
    code = f"import importlib.metadata as m; print(*{{d.version for d in m.distributions() if d.name in {names}}})"
    return subprocess.run(
        [str(python_of(version)), "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()
