"""vLLM's throughput with Greenroom against that without it, where no prompt is seen twice: what its connector costs.

A *block* is a fixed batch of requests, a few at once; every block has prompts of its own, so that neither vLLM's prefix
cache nor Greenroom's arena can help (`cached_tokens` must be 0). Three things differ by more than Greenroom costs, and
each is taken out:

- A machine's speed changes from second to second, by its neighbours. So two servers run their blocks in *slices*: one
  is stopped (SIGSTOP, its sidecar too) while the other runs, in turns of a quarter of a second, and a block's time is
  that in which its server ran. What is left differs by 1 to 2 % from round to round.
- Two starts of one server differ by several per cent, by the pages that the kernel happens to give. So both servers
  have Greenroom, and its connector can be taken out of them between two blocks (`switched`). In one *pair* of blocks
  the first has it and the second has not, in another one it is the other way round: the geometric mean of the two
  ratios is free of what the servers are by chance.
- Left to itself vLLM's CPU build reserves a core for a connector, and where that leaves none (on two cores) it reserves
  nothing and computes on all of them. So both servers compute on the same cores, named outright. Everything else of
  theirs (front end, scheduler, copies, the sidecar) runs on the last core.

A *round* starts both servers anew and runs those two pairs and two in which neither has the connector: their ratio,
which is chance alone, is the noise floor. Memory comes in 2 MiB pages: with 4 KiB ones starts differ twice as much.

vLLM's worker spins for a second after its last step and Greenroom saves a little longer: a block begins when both
servers have come to rest, or it would pay for the block before. What happens after a block's last token is not in its
tokens per second but is in its processor time, which is shown beside.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from demo.report import Bar
from demo.stats import Comparison, compare_pairwise, percentile
from serving import IN, OUT, report, state_file
from serving.report import say
from support.completions import Ask, Completion
from support.flood import prompt
from support.make_model import DEMO
from support.process import ProcessFailed, wait_until
from support.servers import (
    Connector,
    Sidecar,
    VllmConfig,
    VllmServer,
    compute_cores,
    greenroom_transfer_config,
    last_core,
)

ROUNDS = 9
"""The second lowest and the second highest bound the median with 96 %, and of eight, where one broke off, with 93 %."""
ROUNDS_MIN = 8
SECONDS = 3000.0
BLOCK_S = 16.0
"""What a block is to take: of so many requests as the first ones say."""
WARM_REQUESTS = 8
SLICE_S = 0.25
BLOCK_WAIT_S = 300
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
SAVED_SHARE_MIN = 0.95
SAVED_WAIT_S = 10
SWITCH_S = 10
GREENROOM, WITHOUT = ARMS = ("greenroom", "without")
PAIRS = {
    "first": (GREENROOM, WITHOUT),
    "second": (WITHOUT, GREENROOM),
    "neither 1": (WITHOUT, WITHOUT),
    "neither 2": (WITHOUT, WITHOUT),
}
"""Which of the two servers has its connector."""

CONFIG = VllmConfig(
    model=DEMO,
    gpu_blocks=GPU_BLOCKS,
    max_model_len=2048,
    dev_mode=False,
    env=(("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),),
)
SWITCHED = Connector("SwitchedConnector", "serving.switched")
STEPS = "vllm:iteration_tokens_total_count"
ROLES = {"scheduler": "EngineCore", "worker": "Worker"}
"""Of the connector, and the titles of their processes."""


@dataclasses.dataclass(frozen=True)
class Block:
    """One batch. `tokens_s`: prompt and answer tokens by the time it ran. `cpu_s`: of its server, until it rested."""

    arm: str
    round: int
    pair: str
    server: int
    tokens_s: float
    seconds: float
    cpu_s: float
    steps: float
    """Of the engine, by its own count."""
    cached_tokens: int
    saved_share: float | None
    known: int
    """Its sessions that the sidecar has heard of."""
    problem: str | None = None


class Side:
    """A server whose connector can be taken out, with its sidecar."""

    def __init__(self, vllm: VllmServer, sidecar: Sidecar, path: str) -> None:
        self.vllm = vllm
        self.sidecar = sidecar
        self._files = {state_file(path, role): title for role, title in ROLES.items()}

    def signal(self, number: int) -> None:
        """To all of its processes."""
        for process in (self.vllm.process, self.sidecar.process):
            assert process is not None
            process.signal_group(number)

    def _threads(self) -> Iterator[Path]:
        for process in (self.vllm.process, self.sidecar.process):
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

    def switch(self, with_connector: bool) -> None:
        """At rest: see `switched`."""
        for file, title in self._files.items():
            file.write_text("")
            self.vllm.signal_member(title, IN if with_connector else OUT)
        state = "in" if with_connector else "out"
        wait_until("the switch", lambda: all(file.read_text() == state for file in self._files), SWITCH_S)

    def known(self, asks: Sequence[Ask]) -> list[Any]:
        """What the sidecar says of the sessions of these turns that it has heard of."""
        found = [self.sidecar.session(str(ask.session)) for ask in asks]
        return [one for one in found if one is not None]

    def saved(self, asks: Sequence[Ask]) -> float:
        """Share of the full blocks of the last of these turns, which the arena still has, that got there. Waits for
        them, but not for ever."""
        asks = asks[-CONCURRENCY:]
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


class Batch:
    """Requests on their way to one server, a few at once."""

    def __init__(self, side: Side, asks: Sequence[Ask]) -> None:
        self.side = side
        self.asks = asks
        self.answers: list[Completion] = []
        self.ran_s = 0.0
        self._ended_at = math.inf
        self._over = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        try:
            with ThreadPoolExecutor(CONCURRENCY) as pool:
                self.answers = list(pool.map(self.side.vllm.ask, self.asks))
            self._ended_at = time.perf_counter()
        except BaseException as failure:
            self._failure = failure
        finally:
            self._over.set()

    def start(self) -> None:
        """Its server may be stopped: it answers when it goes on."""
        self._thread.start()

    def over(self) -> bool:
        return self._over.is_set()

    def slice(self) -> None:
        """Its server runs for a while, or until the last answer."""
        self.side.signal(signal.SIGCONT)
        began = time.perf_counter()
        self._over.wait(SLICE_S)
        self.side.signal(signal.SIGSTOP)
        self.ran_s += min(time.perf_counter(), self._ended_at) - began

    def finish(self) -> None:
        self._thread.join()
        if self._failure is not None:
            raise self._failure


def alternate(batches: Sequence[Batch]) -> None:
    """Runs them in turns, so that each meets the same machine."""
    began = time.monotonic()
    for batch in batches:
        batch.side.signal(signal.SIGSTOP)
    try:
        for batch in batches:
            batch.start()
        while not all(batch.over() for batch in batches):
            if time.monotonic() - began > BLOCK_WAIT_S:
                raise TimeoutError(f"two blocks did not end within {BLOCK_WAIT_S} s")
            for batch in batches:
                if batch.over():
                    # The other one runs on as it did.
                    time.sleep(SLICE_S)
                else:
                    batch.slice()
    finally:
        for batch in batches:
            batch.side.signal(signal.SIGCONT)
    for batch in batches:
        batch.finish()


class Bench:
    """The blocks of a round."""

    def __init__(self, sides: tuple[Side, Side], number: int, seed: int) -> None:
        self._sides = sides
        self._number = number
        self._seed = seed
        self._rng = random.Random(f"{seed}/{number}")

    def blocks(self) -> list[Block]:
        """What is only slow once is left out: kernels are chosen, the arenas' pages appear."""
        warm = [self._pair(f"warm {pair}", PAIRS[pair], WARM_REQUESTS) for pair in ("first", "second")]
        slowest = max(block.seconds for block in warm[1])
        requests = CONCURRENCY * max(1, round(BLOCK_S / slowest * WARM_REQUESTS / CONCURRENCY))
        names = self._rng.sample(list(PAIRS), len(PAIRS))
        return [block for name in names for block in self._pair(name, PAIRS[name], requests)]

    def _pair(self, name: str, arms: tuple[str, str], requests: int) -> list[Block]:
        batches = []
        for server, (side, arm) in enumerate(zip(self._sides, arms, strict=True)):
            side.switch(arm == GREENROOM)
            names = [f"{name}-{self._number}-{server}-{request}".replace(" ", "") for request in range(requests)]
            asks = [Ask(prompt(name, PROMPT_TOKENS, self._seed), ANSWER_TOKENS, session=name) for name in names]
            batches.append(Batch(side, asks))
        before = []
        for side in self._sides:
            metrics = side.vllm.metrics()
            side.rest()
            before.append((metrics.sum(STEPS), side.cpu_s()))
        order = self._rng.sample(batches, len(batches))
        alternate(order)
        return [
            self._block((name, server), arm, batch, *was)
            for server, (arm, batch, was) in enumerate(zip(arms, batches, before, strict=True))
        ]

    def _block(self, at: tuple[str, int], arm: str, batch: Batch, steps: float, cpu_s: float) -> Block:
        side = batch.side
        saved = side.saved(batch.asks) if arm == GREENROOM else None
        side.rest()
        used_s = side.cpu_s() - cpu_s
        tokens = sum(answer.prompt_tokens + len(answer.tokens) for answer in batch.answers)
        made = Block(
            arm=arm,
            round=self._number,
            pair=at[0],
            server=at[1],
            tokens_s=tokens / batch.ran_s,
            seconds=batch.ran_s,
            cpu_s=used_s,
            steps=side.vllm.metrics().sum(STEPS) - steps,
            cached_tokens=sum(answer.cached_tokens for answer in batch.answers),
            saved_share=saved,
            known=len(side.known(batch.asks)),
        )
        whole = len(batch.asks) * (PROMPT_TOKENS + ANSWER_TOKENS)
        return dataclasses.replace(made, problem=problem(made, tokens, whole))


def problem(block: Block, tokens: int, whole: int) -> str | None:
    """Why the block is not what its arm says; None if it is."""
    if tokens != whole:
        return f"{tokens} tokens instead of {whole}"
    if block.cached_tokens:
        return f"{block.cached_tokens} tokens were cached, not 0"
    if block.saved_share is not None and block.saved_share < SAVED_SHARE_MIN:
        return f"{block.saved_share:.0%} of its last blocks were saved"
    if block.saved_share is None and block.known:
        return f"without Greenroom, and it was told of {block.known} of the sessions"
    return None


def rounds(blocks: Sequence[Block]) -> list[dict[str, float]]:
    """Of each round whose blocks are all valid: the first server's speed over the second's, by pair."""
    found: dict[int, dict[str, dict[int, float]]] = {}
    for block in blocks:
        if block.problem is None:
            found.setdefault(block.round, {}).setdefault(block.pair, {})[block.server] = block.tokens_s
    whole = [pairs for pairs in found.values() if all(len(pairs.get(name, {})) == 2 for name in PAIRS)]
    return [{name: pairs[name][0] / pairs[name][1] for name in PAIRS} for pairs in whole]


def comparisons(blocks: Sequence[Block], seed: int) -> list[Comparison]:
    """With over without, and without over without in the same way."""
    whole = rounds(blocks)
    made = []
    for names, above, below in (
        ((GREENROOM, WITHOUT), "first", "second"),
        ((WITHOUT, WITHOUT), "neither 1", "neither 2"),
    ):
        ratios = [math.sqrt(pairs[above] / pairs[below]) for pairs in whole]
        made.append(compare_pairwise(names, [(ratio, 1.0) for ratio in ratios], seed))
    return made


def bars(made: Sequence[Comparison]) -> list[Bar]:
    lower = made[0].ci95[0]
    return [Bar("greenroom ÷ without, lower 95 % bound of the throughput ratio", lower, RATIO_MIN, lower >= RATIO_MIN)]


def reasons(blocks: Sequence[Block], broken: Sequence[str]) -> list[str]:
    """Why the run proves nothing; empty if it is valid."""
    count = len(rounds(blocks))
    if count >= ROUNDS_MIN:
        return []
    problems = [*broken, *sorted({block.problem for block in blocks if block.problem})]
    return [f"{count} valid rounds of {ROUNDS_MIN} wanted" + "".join(f"; {one}" for one in problems[:3])]


def valid(blocks: Sequence[Block], arm: str) -> list[Block]:
    return [block for block in blocks if block.arm == arm and block.problem is None]


def steps_per_request(blocks: Sequence[Block]) -> float:
    """The engine's, on the average."""
    whole = PROMPT_TOKENS + ANSWER_TOKENS
    requests = [block.tokens_s * block.seconds / whole for block in blocks]
    return sum(block.steps for block in blocks) / sum(requests) if requests else float("nan")


def table(blocks: Sequence[Block], made: Sequence[Comparison]) -> str:
    """For people."""
    heads = f"{'tokens/s P50':>14} {'block':>8} {'CPU':>8} {'steps/request':>14} {'blocks':>8} {'invalid':>8}"
    lines = [f"{'arm':<12} {heads}"]
    for arm in ARMS:
        found = valid(blocks, arm)
        invalid = sum(1 for block in blocks if block.arm == arm and block.problem)
        speed, seconds, cpu_s = (
            percentile([getattr(block, name) for block in found], 0.5) for name in ("tokens_s", "seconds", "cpu_s")
        )
        counts = f"{steps_per_request(found):>14.3f} {len(found):>8} {invalid:>8}"
        lines.append(f"{arm:<12} {speed:>14.1f} {seconds:>6.2f} s {cpu_s:>6.2f} s {counts}")
    lines.append("")
    for each, label in zip(made, ("", "  (noise floor)"), strict=True):
        interval = f"{each.ci95[0]:.4f} to {each.ci95[1]:.4f}"
        name = f"{each.a} ÷ {each.b}"
        lines.append(f"{name:<22} P50 ratio {each.p50_ratio:.4f}   95 % {interval}, {each.pairs} rounds{label}")
    saved = min((block.saved_share for block in blocks if block.saved_share is not None), default=float("nan"))
    cached = sum(block.cached_tokens for block in blocks)
    lines.append(f"Greenroom saved at least {saved:.1%} of a block's last turns; tokens from any cache: {cached}")
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
            "steps_per_request": report.rounded(steps_per_request(found)),
            "invalid": [dataclasses.asdict(block) for block in blocks if block.arm == arm and block.problem],
        }
    return {
        "arms": arms,
        "rounds": [{name: report.rounded(ratio) for name, ratio in pairs.items()} for pairs in rounds(blocks)],
        "comparisons": [report.comparison(each) for each in made],
        "cached_tokens": sum(block.cached_tokens for block in blocks),
    }


def measure(options: argparse.Namespace) -> tuple[list[Block], list[str]]:
    """As many rounds as are asked for, or fewer if time is up; and why others were broken off."""
    blocks: list[Block] = []
    broken: list[str] = []
    start = time.monotonic()
    number = 0
    # One that would end too late does not begin.
    longest = 0.0
    while number < options.rounds and time.monotonic() - start + longest <= options.seconds:
        began = time.monotonic()
        last: list[Block] = []
        try:
            with servers(number) as sides:
                last = Bench(sides, number, options.seed).blocks()
        except (TimeoutError, ProcessFailed) as error:
            # The rounds before it are not lost.
            broken.append(f"round {number + 1}: {error}")
            say(f"  {broken[-1]}")
        longest = max(longest, time.monotonic() - began)
        number += 1
        if not last:
            continue
        blocks += last
        made = comparisons(last, options.seed)
        text = " · ".join(f"{each.a} ÷ {each.b} {each.p50_ratio:.4f}" for each in made)
        text += f", {statistics.fmean(block.seconds for block in last):.1f} s a block"
        text += "".join(f"; {one}" for one in sorted({block.problem for block in last if block.problem}))
        say(f"  round {number:>2} of {options.rounds}, {time.monotonic() - start:>4.0f} s: {text}")
    return blocks, broken


@contextlib.contextmanager
def servers(number: int) -> Iterator[tuple[Side, Side]]:
    """The two of a round, started at once; who is first, and has the best of the free memory, changes."""
    with contextlib.ExitStack() as stack:
        made = []
        for name in ("first", "second"):
            sidecar = stack.enter_context(Sidecar(ARENA, name=name))
            path = stack.enter_context(tempfile.TemporaryDirectory(prefix="greenroom-")) + "/connector"
            own = (("PYTHONPATH", str(Path(__file__).parents[1])), ("GREENROOM_SWITCH", path))
            config = dataclasses.replace(CONFIG, env=CONFIG.env + own)
            transfer = greenroom_transfer_config(SWITCHED, socket=str(sidecar.socket))
            made.append(Side(VllmServer(config, transfer, f"vLLM, {name}"), sidecar, path))
        first, second = made
        for side in (first, second) if number % 2 == 0 else (second, first):
            stack.push(side.vllm.__exit__)
            side.vllm.launch()
        for side in made:
            side.vllm.wait_ready()
        for side in made:
            side.settle()
            side.rest()
        yield first, second


def main(options: argparse.Namespace) -> int:
    began = time.monotonic()
    facts = report.facts(options.seed, CONFIG.version)
    say(f"A round, some four minutes: two servers started anew, {len(PAIRS)} pairs of blocks in slices of {SLICE_S} s.")
    say(f"A block: requests of {PROMPT_TOKENS} + {ANSWER_TOKENS} tokens, {CONCURRENCY} at once, for {BLOCK_S:.0f} s.")
    blocks, broken = measure(options)
    made = comparisons(blocks, options.seed)
    content = {
        **summary(blocks, made),
        "broken_rounds": broken,
        **facts,
        "workload": {
            "model": CONFIG.model,
            "block_s": BLOCK_S,
            "slice_s": SLICE_S,
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
    return report.conclude(bars(made), reasons(blocks, broken), content, options.json)
