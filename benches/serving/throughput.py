"""vLLM's throughput with Greenroom against that without it, where no prompt is ever seen again: Greenroom's whole cost.

Two servers are up, only one is loaded at a time. A *block* is a fixed batch of requests, a few at once; every block has
prompts of its own, so that neither vLLM's prefix cache nor Greenroom's arena can help (`cached_tokens` must be 0). A
*triplet* is two blocks on the stock server and one on Greenroom's, in random order. Greenroom's block over the mean of
the two is one pair; the two stock blocks, which differ by nothing but chance, are the noise floor.

Both servers compute on the same cores, named outright: left to itself vLLM's CPU build reserves a core for a connector,
and where that leaves none (on two cores) it reserves nothing and computes on all of them, so that the servers would
differ by far more than by Greenroom. Everything else of both (front end, scheduler, copies, the sidecar) runs on the
last core, or what of it lands on a computing core by chance would be the largest difference between two blocks.

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
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from demo.report import Bar
from demo.stats import Comparison, compare, percentile
from serving import report
from serving.report import say
from support.completions import Ask
from support.flood import prompt
from support.process import Process, wait_until
from support.servers import Sidecar, VllmConfig, VllmServer, compute_cores, greenroom_transfer_config, last_core

TRIPLETS = 15
TRIPLETS_MIN = 15
REQUESTS = 12
SECONDS = 320.0
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
IDLE_SHARE_MAX = 0.02
"""Of one core, over a whole block: what a server that is not asked may use."""
SAVED_SHARE_MIN = 0.95
SAVED_WAIT_S = 10
ARMS = ("stock 1", "stock 2", "greenroom")
FLOOR = ("stock 1", "stock 2")
RATIO = ("greenroom", "stock")


CONFIG = VllmConfig(
    model="demo",
    gpu_blocks=GPU_BLOCKS,
    max_model_len=2048,
    dev_mode=False,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """One batch. `tokens_s`: prompt and answer tokens by the wall clock. `cpu_s`: of its server, until it rested."""

    arm: str
    triplet: int
    tokens_s: float
    seconds: float
    cpu_s: float
    idle_cpu_share: float
    cached_tokens: int
    saved_share: float | None
    problem: str | None = None


class Side:
    """One of the two servers, with the processes that serve it."""

    def __init__(self, vllm: VllmServer, sidecar: Sidecar | None) -> None:
        self.vllm = vllm
        self.sidecar = sidecar

    def cpu_s(self) -> float:
        processes: list[Process | None] = [self.vllm.process, self.sidecar.process if self.sidecar else None]
        return sum(member.cpu_s for process in processes if process is not None for member in process.members())

    def rest(self) -> None:
        """Waits until it uses next to no processor time."""

        def rests() -> bool:
            before = self.cpu_s()
            time.sleep(REST_S)
            return self.cpu_s() - before <= REST_SHARE * REST_S

        wait_until("a server at rest", rests, REST_WAIT_S, poll_s=0)

    def saved(self, asks: Sequence[Ask]) -> float:
        """Share of the full blocks of these turns that got into the arena. Waits for them, but not for ever."""
        assert self.sidecar is not None
        block = self.vllm.config.block_size
        # The last token is never computed.
        wanted = sum((len(ask.prompt) + ask.max_tokens - 1) // block for ask in asks)
        found = 0

        def all_saved() -> bool:
            nonlocal found
            known = [self.sidecar.session(str(ask.session)) for ask in asks] if self.sidecar else []
            found = sum(one["blocks"]["host"] for one in known if one is not None)
            return found >= wanted

        with contextlib.suppress(TimeoutError):
            wait_until("saving", all_saved, SAVED_WAIT_S)
        return found / wanted


class Bench:
    """Blocks on both servers."""

    def __init__(self, stock: Side, greenroom: Side, options: argparse.Namespace) -> None:
        self._sides = {"stock 1": stock, "stock 2": stock, "greenroom": greenroom}
        self._requests = options.requests
        self._seed = options.seed
        self._rng = random.Random(options.seed)

    def warm_up(self) -> None:
        """What is only slow once: kernels are chosen, the arena's pages appear."""
        for arm in ("stock 1", "greenroom"):
            self._block(arm, -1)

    def triplet(self, number: int) -> list[Block]:
        order = list(ARMS)
        self._rng.shuffle(order)
        return [self._block(arm, number) for arm in order]

    def _block(self, arm: str, triplet: int) -> Block:
        side = self._sides[arm]
        (other,) = {one for one in self._sides.values() if one is not side}
        names = [f"{arm}-{triplet}-{request}".replace(" ", "") for request in range(self._requests)]
        asks = [Ask(prompt(name, PROMPT_TOKENS, self._seed), ANSWER_TOKENS, session=name) for name in names]
        cpu_s, idle_cpu_s = side.cpu_s(), other.cpu_s()
        start = time.perf_counter()
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = list(pool.map(side.vllm.ask, asks))
        seconds = time.perf_counter() - start
        idle_share = (other.cpu_s() - idle_cpu_s) / seconds
        saved = side.saved(asks) if side.sidecar else None
        side.rest()
        tokens = sum(answer.prompt_tokens + len(answer.tokens) for answer in answers)
        made = Block(
            arm=arm,
            triplet=triplet,
            tokens_s=tokens / seconds,
            seconds=seconds,
            cpu_s=side.cpu_s() - cpu_s,
            idle_cpu_share=idle_share,
            cached_tokens=sum(answer.cached_tokens for answer in answers),
            saved_share=saved,
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
        return f"the other server used {block.idle_cpu_share:.1%} of a core"
    if block.saved_share is not None and block.saved_share < SAVED_SHARE_MIN:
        return f"{block.saved_share:.0%} of its blocks were saved"
    return None


def triplets(blocks: Sequence[Block]) -> list[dict[str, Block]]:
    """Those of which all three blocks are valid."""
    by_number: dict[int, dict[str, Block]] = {}
    for block in blocks:
        if block.problem is None:
            by_number.setdefault(block.triplet, {})[block.arm] = block
    return [found for _, found in sorted(by_number.items()) if len(found) == len(ARMS)]


def comparisons(blocks: Sequence[Block], seed: int) -> list[Comparison]:
    """Greenroom over stock, then stock over stock."""
    found = triplets(blocks)
    speeds = [{arm: block.tokens_s for arm, block in each.items()} for each in found]
    ratio = [(each["greenroom"], statistics.fmean(each[arm] for arm in FLOOR)) for each in speeds]
    floor = [(each["stock 1"], each["stock 2"]) for each in speeds]
    return [compare(RATIO, ratio, seed), compare(FLOOR, floor, seed)]


def bars(made: Sequence[Comparison]) -> list[Bar]:
    lower = made[0].ci95[0]
    return [Bar("greenroom ÷ stock, lower 95 % bound of the throughput ratio", lower, RATIO_MIN, lower >= RATIO_MIN)]


def reasons(blocks: Sequence[Block]) -> list[str]:
    """Why the run proves nothing; empty if it is valid."""
    count = len(triplets(blocks))
    if count >= TRIPLETS_MIN:
        return []
    problems = sorted({block.problem for block in blocks if block.problem})
    return [f"{count} valid triplets of {TRIPLETS_MIN} wanted" + "".join(f"; {one}" for one in problems[:3])]


def valid(blocks: Sequence[Block], arm: str) -> list[Block]:
    return [block for block in blocks if block.arm == arm and block.problem is None]


def table(blocks: Sequence[Block], made: Sequence[Comparison]) -> str:
    """For people."""
    lines = [f"{'arm':<12} {'tokens/s P50':>14} {'block':>8} {'CPU':>8} {'blocks':>8} {'invalid':>8}"]
    for arm in ARMS:
        found = valid(blocks, arm)
        invalid = sum(1 for block in blocks if block.arm == arm and block.problem)
        speed, seconds, cpu_s = (
            percentile([getattr(block, name) for block in found], 0.5) for name in ("tokens_s", "seconds", "cpu_s")
        )
        lines.append(f"{arm:<12} {speed:>14.1f} {seconds:>6.2f} s {cpu_s:>6.2f} s {len(found):>8} {invalid:>8}")
    lines.append("")
    for each, label in zip(made, ("", "  (noise floor)"), strict=True):
        interval = f"{each.ci95[0]:.4f} to {each.ci95[1]:.4f}"
        name = f"{each.a} ÷ {each.b}"
        lines.append(f"{name:<20} P50 ratio {each.p50_ratio:.4f}   95 % {interval}, {each.pairs} triplets{label}")
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
            "invalid": [dataclasses.asdict(block) for block in blocks if block.arm == arm and block.problem],
        }
    return {
        "arms": arms,
        "comparisons": [report.comparison(each) for each in made],
        "idle_cpu_share_max": report.rounded(max((block.idle_cpu_share for block in blocks), default=float("nan"))),
        "cached_tokens": sum(block.cached_tokens for block in blocks),
    }


def measure(bench: Bench, wanted: int, seconds: float) -> list[Block]:
    """Triplets until there are enough, or time is up."""
    blocks: list[Block] = []
    start = time.monotonic()
    bench.warm_up()
    number = 0
    # One that would end too late does not begin.
    longest = 0.0
    while len(triplets(blocks)) < wanted and time.monotonic() - start + longest <= seconds:
        began = time.monotonic()
        new = bench.triplet(number)
        longest = max(longest, time.monotonic() - began)
        blocks += new
        number += 1
        line = " · ".join(
            f"{block.arm} {block.tokens_s:.0f}" + (f" ({block.problem})" if block.problem else "") for block in new
        )
        say(f"  triplet {number:>2} of {wanted}, {time.monotonic() - start:>3.0f} s, tokens/s: {line}")
    return blocks


@contextlib.contextmanager
def sides() -> Iterator[tuple[Side, Side]]:
    """Both servers, started at once."""
    with contextlib.ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(ARENA))
        ours = VllmServer(CONFIG, greenroom_transfer_config(socket=str(sidecar.socket)), "vLLM with Greenroom")
        stock = VllmServer(CONFIG, None, "vLLM alone")
        assert sidecar.process is not None
        os.sched_setaffinity(sidecar.process.pid, {last_core()})
        for server in (ours, stock):
            stack.push(server.__exit__)
            server.launch()
            assert server.process is not None
            # What it starts inherits it; vLLM's worker moves its computation to `compute_cores` by itself.
            os.sched_setaffinity(server.process.pid, {last_core()})
        for server in (ours, stock):
            server.wait_ready(say)
        yield Side(stock, None), Side(ours, sidecar)


def main(options: argparse.Namespace) -> int:
    began = time.monotonic()
    facts = report.facts(options.seed, CONFIG.version)
    say("Starting the sidecar, vLLM with Greenroom and vLLM alone (about a minute; two on a busy machine) …")
    with sides() as (stock, greenroom):
        for side in (stock, greenroom):
            side.rest()
        say(
            f"Triplets: {options.requests} requests of {PROMPT_TOKENS} + {ANSWER_TOKENS} tokens, {CONCURRENCY} at once."
        )
        blocks = measure(Bench(stock, greenroom, options), options.triplets, options.seconds)
    made = comparisons(blocks, options.seed)
    content = {
        **summary(blocks, made),
        **facts,
        "workload": {
            "model": CONFIG.model,
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
