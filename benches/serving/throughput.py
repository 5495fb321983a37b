"""vLLM's throughput with Greenroom against that without it, where no prompt is ever seen again: Greenroom's whole cost.

A *block* is a fixed batch of requests, a few at once; every block has prompts of its own, so that neither vLLM's prefix
cache nor Greenroom's arena can help (`cached_tokens` must be 0). A *round* starts three servers anew, two of stock vLLM
and one with Greenroom, and loads one at a time with some blocks each, in random order: two starts of one server differ
by more than two blocks of one start. Greenroom's speed over the mean of the other two is one pair; the two stock
servers, which differ by nothing but chance, are the noise floor.

All servers compute on the same cores, named outright: left to itself vLLM's CPU build reserves a core for a connector,
and where that leaves none (on two cores) it reserves nothing and computes on all of them, so that the servers would
differ by far more than by Greenroom. Everything else of theirs (front end, scheduler, copies, the sidecar) runs on the
last core, or what of it lands on a computing core by chance would be the largest difference between two blocks. And all
take their memory in 2 MiB pages: which 4 KiB pages the kernel happens to give makes two starts differ by 4 % (with
large ones by 2 %, both measured with this load on two cores).

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
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from demo.report import Bar
from demo.stats import Comparison, compare_pairwise, percentile
from serving import report
from serving.report import say
from support.completions import Ask
from support.flood import prompt
from support.process import Process, wait_until
from support.servers import Sidecar, VllmConfig, VllmServer, compute_cores, greenroom_transfer_config, last_core

ROUNDS = 13
ROUNDS_MIN = 8
BLOCKS = 3
"""Of a server in a round, after one that warms it up."""
REQUESTS = 12
SECONDS = 2400.0
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
    env=(("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),),
)


@dataclasses.dataclass(frozen=True)
class Block:
    """One batch. `tokens_s`: prompt and answer tokens by the wall clock. `cpu_s`: of its server, until it rested."""

    arm: str
    round: int
    tokens_s: float
    seconds: float
    cpu_s: float
    idle_cpu_share: float
    cached_tokens: int
    saved_share: float | None
    problem: str | None = None


class Side:
    """One of the servers, with the processes that serve it."""

    def __init__(self, vllm: VllmServer, sidecar: Sidecar | None) -> None:
        self.vllm = vllm
        self.sidecar = sidecar

    def cpu_s(self) -> float:
        processes: list[Process | None] = [self.vllm.process, self.sidecar.process if self.sidecar else None]
        return sum(member.cpu_s for process in processes if process is not None for member in process.members())

    def settle(self) -> None:
        """Everything but what vLLM has put on one core by itself, which is the computation, goes to the last one."""
        for process in (self.vllm.process, self.sidecar.process if self.sidecar else None):
            for member in process.members() if process is not None else ():
                for task in Path(f"/proc/{member.pid}/task").iterdir():
                    # A thread may have ended since it was listed.
                    with contextlib.suppress(ProcessLookupError):
                        if len(os.sched_getaffinity(int(task.name))) > 1:
                            os.sched_setaffinity(int(task.name), {last_core()})

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
    """The blocks of a round."""

    def __init__(self, sides: Mapping[str, Side], number: int, options: argparse.Namespace) -> None:
        self._sides = sides
        self._number = number
        self._requests = options.requests
        self._seed = options.seed
        self._rng = random.Random(f"{options.seed}/{number}")

    def blocks(self) -> list[Block]:
        """What is only slow once is left out: kernels are chosen, the arena's pages appear."""
        for arm in ARMS:
            self._block(arm, "warm-up")
        order = [(arm, part) for part in range(BLOCKS) for arm in self._rng.sample(ARMS, len(ARMS))]
        return [self._block(arm, str(part)) for arm, part in order]

    def _block(self, arm: str, part: str) -> Block:
        side = self._sides[arm]
        others = [one for one in self._sides.values() if one is not side]
        names = [f"{arm}-{self._number}-{part}-{request}".replace(" ", "") for request in range(self._requests)]
        asks = [Ask(prompt(name, PROMPT_TOKENS, self._seed), ANSWER_TOKENS, session=name) for name in names]
        cpu_s, idle_cpu_s = side.cpu_s(), [other.cpu_s() for other in others]
        start = time.perf_counter()
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = list(pool.map(side.vllm.ask, asks))
        seconds = time.perf_counter() - start
        idle = [other.cpu_s() - before for other, before in zip(others, idle_cpu_s, strict=True)]
        idle_share = max(idle) / seconds
        saved = side.saved(asks) if side.sidecar else None
        side.rest()
        tokens = sum(answer.prompt_tokens + len(answer.tokens) for answer in answers)
        made = Block(
            arm=arm,
            round=self._number,
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
        return f"another server used {block.idle_cpu_share:.1%} of a core"
    if block.saved_share is not None and block.saved_share < SAVED_SHARE_MIN:
        return f"{block.saved_share:.0%} of its blocks were saved"
    return None


def rounds(blocks: Sequence[Block]) -> list[dict[str, float]]:
    """Tokens per second of each server, of the rounds in which each has a valid block."""
    by_round: dict[int, dict[str, list[Block]]] = {}
    for block in blocks:
        if block.problem is None:
            by_round.setdefault(block.round, {}).setdefault(block.arm, []).append(block)
    return [
        {arm: statistics.harmonic_mean([block.tokens_s for block in found[arm]]) for arm in ARMS}
        for _, found in sorted(by_round.items())
        if len(found) == len(ARMS)
    ]


def comparisons(blocks: Sequence[Block], seed: int) -> list[Comparison]:
    """Greenroom over stock, then stock over stock."""
    speeds = rounds(blocks)
    ratio = [(each["greenroom"], statistics.fmean(each[arm] for arm in FLOOR)) for each in speeds]
    floor = [(each["stock 1"], each["stock 2"]) for each in speeds]
    return [compare_pairwise(RATIO, ratio, seed), compare_pairwise(FLOOR, floor, seed)]


def bars(made: Sequence[Comparison]) -> list[Bar]:
    lower = made[0].ci95[0]
    return [Bar("greenroom ÷ stock, lower 95 % bound of the throughput ratio", lower, RATIO_MIN, lower >= RATIO_MIN)]


def reasons(blocks: Sequence[Block]) -> list[str]:
    """Why the run proves nothing; empty if it is valid."""
    count = len(rounds(blocks))
    if count >= ROUNDS_MIN:
        return []
    problems = sorted({block.problem for block in blocks if block.problem})
    return [f"{count} valid rounds of {ROUNDS_MIN} wanted" + "".join(f"; {one}" for one in problems[:3])]


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
        lines.append(f"{name:<20} P50 ratio {each.p50_ratio:.4f}   95 % {interval}, {each.pairs} rounds{label}")
    idle = max((block.idle_cpu_share for block in blocks), default=float("nan"))
    saved = min((block.saved_share for block in blocks if block.saved_share is not None), default=float("nan"))
    cached = sum(block.cached_tokens for block in blocks)
    lines.append(f"the servers that were not asked used at most {idle:.2%} of a core during a block")
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


def measure(options: argparse.Namespace) -> list[Block]:
    """Rounds until there are enough, or time is up."""
    blocks: list[Block] = []
    start = time.monotonic()
    number = 0
    # One that would end too late does not begin.
    longest = 0.0
    while number < options.rounds and time.monotonic() - start + longest <= options.seconds:
        began = time.monotonic()
        with sides(number) as found:
            blocks += Bench(found, number, options).blocks()
        longest = max(longest, time.monotonic() - began)
        number += 1
        last = rounds([block for block in blocks if block.round == number - 1])
        problems = sorted({block.problem for block in blocks if block.round == number - 1 and block.problem})
        speeds = " · ".join(f"{arm} {speed:.0f}" for arm, speed in last[0].items()) if last else "; ".join(problems)
        say(f"  round {number:>2} of {options.rounds}, {time.monotonic() - start:>4.0f} s, tokens/s: {speeds}")
    return blocks


@contextlib.contextmanager
def sides(number: int) -> Iterator[dict[str, Side]]:
    """The three servers of a round, started at once; who is first, and has the best of the free memory, changes."""
    with contextlib.ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(ARENA))
        ours = VllmServer(CONFIG, greenroom_transfer_config(socket=str(sidecar.socket)), "vLLM with Greenroom")
        found = {arm: Side(VllmServer(CONFIG, None, f"vLLM alone, {arm}"), None) for arm in FLOOR}
        found["greenroom"] = Side(ours, sidecar)
        for turn in range(len(ARMS)):
            side = found[ARMS[(turn + number) % len(ARMS)]]
            stack.push(side.vllm.__exit__)
            side.vllm.launch()
        for side in found.values():
            side.vllm.wait_ready()
        for side in found.values():
            side.settle()
            side.rest()
        yield found


def main(options: argparse.Namespace) -> int:
    began = time.monotonic()
    facts = report.facts(options.seed, CONFIG.version)
    say(f"A round, two to three minutes: three servers started anew, {BLOCKS} blocks on each.")
    say(f"A block: {options.requests} requests of {PROMPT_TOKENS} + {ANSWER_TOKENS} tokens, {CONCURRENCY} at once.")
    blocks = measure(options)
    made = comparisons(blocks, options.seed)
    content = {
        **summary(blocks, made),
        **facts,
        "workload": {
            "model": CONFIG.model,
            "blocks_in_a_round": BLOCKS,
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
