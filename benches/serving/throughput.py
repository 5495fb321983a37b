"""vLLM's throughput with Greenroom against that without it, where no prompt is ever seen again: Greenroom's whole cost.

A *block* is a fixed batch of requests, a few at once; every block has prompts of its own, so that neither vLLM's prefix
cache nor Greenroom's arena can help (`cached_tokens` must be 0). Two starts of one server differ by several per cent,
by the pages that the kernel happens to give: more than Greenroom costs. So the server with Greenroom and the one
without are one process, out of which the connector is taken between two blocks (`switched`). A *set* is four blocks in
random order: one with Greenroom, two without, and one of a stock server that never had a connector. A *round* starts
both servers anew and makes some sets. Of each set, Greenroom's speed over the mean of the two without is a ratio; the
two, which differ by nothing but chance, are the noise floor; and that mean over the stock server shows, as far as two
starts can be compared, that a server without its connector is a stock one. What a start costs by chance all its sets
share, so that a round counts once, with the median of its sets.

Both servers compute on the same cores, named outright: left to itself vLLM's CPU build reserves a core for a connector,
and where that leaves none (on two cores) it reserves nothing and computes on all of them, so that the servers would
differ by far more than by Greenroom. Everything else of theirs (front end, scheduler, copies, the sidecar) runs on the
last core, or what of it lands on a computing core by chance would be the largest difference between two blocks. And
they take their memory in 2 MiB pages: with 4 KiB ones starts differ twice as much.

vLLM's worker spins for a second after its last step and Greenroom saves a little longer: a block begins when all
servers have come to rest, or it would pay for the block before. What happens after a block's last token is not in its
tokens per second but is in its processor time, which is shown beside.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from demo.report import Bar
from demo.stats import Comparison, compare_pairwise, percentile
from serving import IN, OUT, report, state_file
from serving.report import say
from support.completions import Ask
from support.flood import prompt
from support.make_model import DEMO
from support.process import wait_until
from support.servers import (
    Connector,
    Sidecar,
    VllmConfig,
    VllmServer,
    compute_cores,
    greenroom_transfer_config,
    last_core,
)

ROUNDS = 8
ROUNDS_MIN = 8
SETS = 6
"""Of a round, after one that warms up."""
SETS_MIN = 5
"""Valid ones, of a round that counts."""
REQUESTS = 16
SECONDS = 3000.0
CONCURRENCY = 4
PROMPT_TOKENS = 512
ANSWER_TOKENS = 64
RATIO_MIN = 0.98

ARENA = "128MiB"
"""Full after a few blocks: from then on saves evict, as in a server that has been up for a while."""
GPU_BLOCKS = 400
REST_S = 0.4
REST_SHARE = 0.05
"""Of one core, over `REST_S`: below it a server is at rest."""
REST_WAIT_S = 30
IDLE_SHARE_MAX = 0.03
"""Of one core, over a whole block: what a server that is not asked may use. vLLM alone uses up to 2.2 %."""
SAVED_SHARE_MIN = 0.95
SAVED_WAIT_S = 10
SWITCH_S = 10
ARMS = ("without 1", "without 2", "greenroom", "stock")
FLOOR = ("without 1", "without 2")
RATIO = ("greenroom", "without")
STARTS = ("without", "stock")

CONFIG = VllmConfig(
    model=DEMO,
    gpu_blocks=GPU_BLOCKS,
    max_model_len=2048,
    dev_mode=False,
    env=(("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),),
)
SWITCHED = Connector("SwitchedConnector", "serving.switched")
STEPS = "vllm:iteration_tokens_total_count"
QUEUED = "vllm:request_queue_time_seconds_sum"
ROLES = {"scheduler": "EngineCore", "worker": "Worker"}
"""Of the connector, and the titles of their processes."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One batch. `tokens_s`: prompt and answer tokens by the wall clock. `cpu_s`: of its server, until it rested."""

    arm: str
    round: int
    set: int
    tokens_s: float
    seconds: float
    cpu_s: float
    steps: float
    """Of the engine, by its own count."""
    queue_s: float
    """From a request's arrival in the engine to its first step: the sum over the requests."""
    idle_cpu_share: float
    cached_tokens: int
    saved_share: float | None
    known: int
    """Its sessions that the sidecar has heard of."""
    problem: str | None = None


class Side:
    """A server, with the processes that serve it."""

    def __init__(self, vllm: VllmServer, sidecar: Sidecar | None = None) -> None:
        self.vllm = vllm
        self.sidecar = sidecar

    def _threads(self) -> Iterator[Path]:
        for process in (self.vllm.process, self.sidecar.process if self.sidecar else None):
            for member in process.members() if process is not None else ():
                yield from Path(f"/proc/{member.pid}/task").iterdir()

    def cpu_s(self) -> float:
        """Of its threads, in nanoseconds' steps: the ticks of `/proc/*/stat` are 1 % of a block for each process."""
        used_ns = 0
        for thread in self._threads():
            # A thread may have ended since it was listed.
            with contextlib.suppress(OSError):
                used_ns += int((thread / "schedstat").read_text().split()[0])
        return used_ns / 1e9

    def settle(self) -> None:
        """Everything but what vLLM has put on one core by itself, which is the computation, goes to the last one."""
        for thread in self._threads():
            with contextlib.suppress(ProcessLookupError):
                if len(os.sched_getaffinity(int(thread.name))) > 1:
                    os.sched_setaffinity(int(thread.name), {last_core()})

    def rest(self) -> None:
        """Waits until it uses next to no processor time."""

        def rests() -> bool:
            before = self.cpu_s()
            time.sleep(REST_S)
            return self.cpu_s() - before <= REST_SHARE * REST_S

        wait_until("a server at rest", rests, REST_WAIT_S, poll_s=0)


class Switched(Side):
    """The server whose connector can be taken out, and its sidecar."""

    def __init__(self, vllm: VllmServer, sidecar: Sidecar, path: str) -> None:
        super().__init__(vllm, sidecar)
        self._sidecar = sidecar
        self._files = {state_file(path, role): title for role, title in ROLES.items()}

    def switch(self, with_connector: bool) -> None:
        """At rest: see `switched`."""
        for file, title in self._files.items():
            file.write_text("")
            self.vllm.signal_member(title, IN if with_connector else OUT)
        state = "in" if with_connector else "out"
        wait_until("the switch", lambda: all(file.read_text() == state for file in self._files), SWITCH_S)

    def known(self, asks: Sequence[Ask]) -> list[Any]:
        """What the sidecar says of the sessions of these turns that it has heard of."""
        found = [self._sidecar.session(str(ask.session)) for ask in asks]
        return [one for one in found if one is not None]

    def saved(self, asks: Sequence[Ask]) -> float:
        """Share of the full blocks of these turns that got into the arena. Waits for them, but not for ever."""
        block = self.vllm.config.block_size
        # The last token is never computed.
        wanted = sum((len(ask.prompt) + ask.max_tokens - 1) // block for ask in asks)
        found = 0

        def all_saved() -> bool:
            nonlocal found
            found = sum(one["blocks"]["host"] for one in self.known(asks))
            return found >= wanted

        with contextlib.suppress(TimeoutError):
            wait_until("saving", all_saved, SAVED_WAIT_S)
        return found / wanted


class Bench:
    """The blocks of a round."""

    def __init__(self, switched: Switched, stock: Side, number: int, options: argparse.Namespace) -> None:
        self._switched = switched
        self._stock = stock
        self._number = number
        self._requests = options.requests
        self._seed = options.seed
        self._rng = random.Random(f"{options.seed}/{number}")

    def blocks(self) -> list[Block]:
        """What is only slow once is left out: kernels are chosen, the arena's pages appear."""
        made = [self._block(arm, number) for number in range(SETS + 1) for arm in self._rng.sample(ARMS, len(ARMS))]
        return made[len(ARMS) :]

    def _block(self, arm: str, set_: int) -> Block:
        side, other = (self._stock, self._switched) if arm == "stock" else (self._switched, self._stock)
        if arm != "stock":
            self._switched.switch(arm == "greenroom")
        names = [f"{arm}-{self._number}-{set_}-{request}".replace(" ", "") for request in range(self._requests)]
        asks = [Ask(prompt(name, PROMPT_TOKENS, self._seed), ANSWER_TOKENS, session=name) for name in names]
        before = side.vllm.metrics()
        side.rest()
        cpu_s, idle_cpu_s = side.cpu_s(), other.cpu_s()
        start = time.perf_counter()
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = list(pool.map(side.vllm.ask, asks))
        seconds = time.perf_counter() - start
        idle_share = (other.cpu_s() - idle_cpu_s) / seconds
        saved = self._switched.saved(asks) if arm == "greenroom" else None
        side.rest()
        used_s, after = side.cpu_s() - cpu_s, side.vllm.metrics()
        tokens = sum(answer.prompt_tokens + len(answer.tokens) for answer in answers)
        made = Block(
            arm=arm,
            round=self._number,
            set=set_,
            tokens_s=tokens / seconds,
            seconds=seconds,
            cpu_s=used_s,
            steps=after.sum(STEPS) - before.sum(STEPS),
            queue_s=after.sum(QUEUED) - before.sum(QUEUED),
            idle_cpu_share=idle_share,
            cached_tokens=sum(answer.cached_tokens for answer in answers),
            saved_share=saved,
            known=len(self._switched.known(asks)),
        )
        whole = self._requests * (PROMPT_TOKENS + ANSWER_TOKENS)
        return dataclasses.replace(made, problem=problem(made, tokens, whole))


def problem(block: Block, tokens: int, whole: int) -> str | None:
    """Why the block is not what its arm says; None if it is."""
    if tokens != whole:
        return f"{tokens} tokens instead of {whole}"
    if block.cached_tokens:
        return f"{block.cached_tokens} tokens were cached, not 0"
    if block.idle_cpu_share > IDLE_SHARE_MAX:
        return f"another server used {block.idle_cpu_share:.1%} of a core"
    if block.saved_share is not None and block.saved_share < SAVED_SHARE_MIN:
        return f"{block.saved_share:.0%} of its blocks were saved"
    if block.saved_share is None and block.known:
        return f"without Greenroom, and it was told of {block.known} of the sessions"
    return None


def rounds(blocks: Sequence[Block]) -> list[list[dict[str, float]]]:
    """Tokens per second of each arm: the sets, whose blocks are all valid, of the rounds with enough of them."""
    found: dict[int, dict[int, dict[str, float]]] = {}
    for block in blocks:
        if block.problem is None:
            found.setdefault(block.round, {}).setdefault(block.set, {})[block.arm] = block.tokens_s
    valid_sets = ([speeds for speeds in sets.values() if len(speeds) == len(ARMS)] for sets in found.values())
    return [sets for sets in valid_sets if len(sets) >= SETS_MIN]


def comparisons(blocks: Sequence[Block], seed: int) -> list[Comparison]:
    """With over without, without over without, without over stock."""

    def without(speeds: dict[str, float]) -> float:
        return statistics.fmean(speeds[arm] for arm in FLOOR)

    kinds: dict[tuple[str, str], Callable[[dict[str, float]], float]] = {
        RATIO: lambda speeds: speeds["greenroom"] / without(speeds),
        FLOOR: lambda speeds: speeds[FLOOR[0]] / speeds[FLOOR[1]],
        STARTS: lambda speeds: without(speeds) / speeds["stock"],
    }
    return [
        compare_pairwise(names, [(statistics.median(map(ratio, sets)), 1.0) for sets in rounds(blocks)], seed)
        for names, ratio in kinds.items()
    ]


def bars(made: Sequence[Comparison]) -> list[Bar]:
    lower = made[0].ci95[0]
    return [Bar("greenroom ÷ without, lower 95 % bound of the throughput ratio", lower, RATIO_MIN, lower >= RATIO_MIN)]


def reasons(blocks: Sequence[Block]) -> list[str]:
    """Why the run proves nothing; empty if it is valid."""
    count = len(rounds(blocks))
    if count >= ROUNDS_MIN:
        return []
    problems = sorted({block.problem for block in blocks if block.problem})
    return [f"{count} valid rounds of {ROUNDS_MIN} wanted" + "".join(f"; {one}" for one in problems[:3])]


def valid(blocks: Sequence[Block], arm: str) -> list[Block]:
    return [block for block in blocks if block.arm == arm and block.problem is None]


def mean(blocks: Sequence[Block], figure: str) -> float:
    return statistics.fmean(getattr(block, figure) for block in blocks) if blocks else float("nan")


def table(blocks: Sequence[Block], made: Sequence[Comparison]) -> str:
    """For people."""
    heads = f"{'tokens/s P50':>14} {'block':>8} {'CPU':>8} {'steps':>8} {'queued':>9} {'blocks':>8} {'invalid':>8}"
    lines = [f"{'arm':<12} {heads}"]
    for arm in ARMS:
        found = valid(blocks, arm)
        invalid = sum(1 for block in blocks if block.arm == arm and block.problem)
        speed, seconds, cpu_s = (
            percentile([getattr(block, name) for block in found], 0.5) for name in ("tokens_s", "seconds", "cpu_s")
        )
        steps, queue_s = mean(found, "steps"), mean(found, "queue_s")
        counts = f"{steps:>8.2f} {queue_s * 1e3:>6.1f} ms {len(found):>8} {invalid:>8}"
        lines.append(f"{arm:<12} {speed:>14.1f} {seconds:>6.2f} s {cpu_s:>6.2f} s {counts}")
    lines.append("")
    for each, label in zip(made, ("", "  (noise floor)", "  (two starts)"), strict=True):
        interval = f"{each.ci95[0]:.4f} to {each.ci95[1]:.4f}"
        name = f"{each.a} ÷ {each.b}"
        lines.append(f"{name:<22} P50 ratio {each.p50_ratio:.4f}   95 % {interval}, {each.pairs} rounds{label}")
    idle = max((block.idle_cpu_share for block in blocks), default=float("nan"))
    saved = min((block.saved_share for block in blocks if block.saved_share is not None), default=float("nan"))
    cached = sum(block.cached_tokens for block in blocks)
    lines.append(f"the server that was not asked used at most {idle:.2%} of a core during a block")
    lines.append(f"Greenroom saved at least {saved:.1%} of a block's KV; tokens that came from any cache: {cached}")
    return "\n".join(lines)


def summary(blocks: Sequence[Block], made: Sequence[Comparison]) -> dict[str, Any]:
    """The arms and comparisons, for the JSON file."""
    arms = {}
    for arm in ARMS:
        found = valid(blocks, arm)
        arms[arm] = {
            "tokens_s": report.spread([block.tokens_s for block in found]),
            "seconds": report.spread([block.seconds for block in found]),
            "cpu_s": report.spread([block.cpu_s for block in found]),
            "steps_mean": report.rounded(mean(found, "steps")),
            "queue_s_mean": report.rounded(mean(found, "queue_s")),
            "invalid": [dataclasses.asdict(block) for block in blocks if block.arm == arm and block.problem],
        }
    return {
        "arms": arms,
        "comparisons": [report.comparison(each) for each in made],
        "idle_cpu_share_max": report.rounded(max((block.idle_cpu_share for block in blocks), default=float("nan"))),
        "cached_tokens": sum(block.cached_tokens for block in blocks),
    }


def measure(options: argparse.Namespace) -> list[Block]:
    """Rounds until there are enough, or time is up."""
    blocks: list[Block] = []
    start = time.monotonic()
    number = 0
    # One that would end too late does not begin.
    longest = 0.0
    while number < options.rounds and time.monotonic() - start + longest <= options.seconds:
        began = time.monotonic()
        with sides(number) as (switched, stock):
            blocks += Bench(switched, stock, number, options).blocks()
        longest = max(longest, time.monotonic() - began)
        number += 1
        last = [block for block in blocks if block.round == number - 1]
        means = {arm: [block.tokens_s for block in last if block.arm == arm] for arm in ARMS}
        speeds = " · ".join(f"{arm} {statistics.harmonic_mean(found):.0f}" for arm, found in means.items())
        speeds += "".join(f"; {one}" for one in sorted({block.problem for block in last if block.problem}))
        say(f"  round {number:>2} of {options.rounds}, {time.monotonic() - start:>4.0f} s, tokens/s: {speeds}")
    return blocks


@contextlib.contextmanager
def sides(number: int) -> Iterator[tuple[Switched, Side]]:
    """The two servers of a round, started at once; who is first, and has the best of the free memory, changes."""
    with contextlib.ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(ARENA))
        path = stack.enter_context(tempfile.TemporaryDirectory(prefix="greenroom-")) + "/connector"
        own = (("PYTHONPATH", str(Path(__file__).parents[1])), ("GREENROOM_SWITCH", path))
        config = dataclasses.replace(CONFIG, env=CONFIG.env + own)
        transfer = greenroom_transfer_config(SWITCHED, socket=str(sidecar.socket))
        switched = Switched(VllmServer(config, transfer, "vLLM with Greenroom"), sidecar, path)
        stock = Side(VllmServer(CONFIG, None, "vLLM alone"))
        for side in (switched, stock) if number % 2 == 0 else (stock, switched):
            stack.push(side.vllm.__exit__)
            side.vllm.launch()
        for side in (switched, stock):
            side.vllm.wait_ready()
        for side in (switched, stock):
            side.settle()
            side.rest()
        yield switched, stock


def main(options: argparse.Namespace) -> int:
    began = time.monotonic()
    facts = report.facts(options.seed, CONFIG.version)
    say(f"A round, five minutes: two servers started anew, {SETS} sets of {len(ARMS)} blocks.")
    say(f"A block: {options.requests} requests of {PROMPT_TOKENS} + {ANSWER_TOKENS} tokens, {CONCURRENCY} at once.")
    blocks = measure(options)
    made = comparisons(blocks, options.seed)
    content = {
        **summary(blocks, made),
        **facts,
        "workload": {
            "model": CONFIG.model,
            "sets_in_a_round": SETS,
            "requests": options.requests,
            "concurrency": CONCURRENCY,
            "prompt_tokens": PROMPT_TOKENS,
            "answer_tokens": ANSWER_TOKENS,
            "pool_blocks": GPU_BLOCKS,
            "arena": ARENA,
            "compute_cores": compute_cores(),
            "other_core": last_core(),
        },
        "seconds": round(time.monotonic() - began, 1),
    }
    say("")
    say(table(blocks, made))
    say("")
    return report.conclude(bars(made), reasons(blocks), content, options.json)
