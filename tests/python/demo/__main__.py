"""`python -m demo`: see `make demo`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import random
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from demo import report
from demo.arms import FLOOD_AGENTS, Greenroom, Plain, Plan, Sample
from support import nvidia
from support.flood import FLOOD_MAX_TOKENS
from support.make_model import DEMO, kv_bytes_per_token
from support.paths import CUDA, ROOT
from support.servers import (
    Cuda,
    Rig,
    Sidecar,
    VllmConfig,
    VllmServer,
    compute_cores,
    greenroom_transfer_config,
    model_folder,
    vllm_version,
)

EXTRA_ROUNDS = 6
"""Rounds beyond those asked for, to make up for invalid samples."""

RECOMPUTE_EVERY = 4
"""A recomputed turn takes seconds, so only every fourth round has one."""

KEEP_EVERY = 5


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the demo runs on, and a workload that takes real time there but no more than it must."""

    model: str
    prompt_tokens: int
    flood_tokens: int
    """Turn of each agent that takes the pool."""
    flood_answer_tokens: int
    """A turn after a load begins that much later than the one before it: they must meet all the same."""
    flood_spare: int
    agents: int
    seconds: float
    block_size: int
    spare_arena: float
    """Size of the arena in what the workload saves. What is beyond it is memory to be cleared and registered."""
    version: str = "0.32"
    memory_share: float | None = None
    """Of the GPU; None: the CPU build."""


CPU = Machine(DEMO, 6000, 5000, FLOOD_MAX_TOKENS, 1, agents=2, seconds=330, block_size=32, spare_arena=2.0)
GPU = Machine(
    "llama-8b",
    16_000,
    11_000,
    64,
    3,
    agents=1,
    seconds=110,
    block_size=16,
    spare_arena=1.25,
    version=CUDA,
    memory_share=0.35,
)


def say(line: str) -> None:
    print(line, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description="TTFT after a tool wait, four arms, real vLLM.")
    parser.add_argument("--cuda", action="store_true", help="on a GPU, with the vLLM of the Python in GPU_PYTHON")
    parser.add_argument("--model", help="folder of a model; default: a random one is made")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of all arms (default 30)")
    parser.add_argument("--seconds", type=float, help="no new round begins after this time (default 330; GPU 110)")
    parser.add_argument("--prompt-tokens", type=int, help="length of a turn (default 6000; GPU 16000)")
    parser.add_argument("--memory", help="size of the arena; default: what the workload needs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "target", help="folder for demo.json and demo.svg")
    given = parser.parse_args()
    given.machine = GPU if given.cuda else CPU
    for name in ("model", "seconds", "prompt_tokens"):
        if getattr(given, name) is None:
            setattr(given, name, getattr(given.machine, name))
    return given


def pool_blocks(machine: Machine) -> int:
    """A pool that the flood's agents fill together."""
    return 1 + FLOOD_AGENTS + FLOOD_AGENTS * -(-machine.flood_tokens // machine.block_size)


def arena_mib(machine: Machine, plan: Plan, token_bytes: int) -> int:
    """What the agents and the flood save, and some more."""
    tokens = 3 * plan.agents * (plan.prompt_tokens + 64) + FLOOD_AGENTS * (machine.flood_tokens + 64)
    return max(256, math.ceil(machine.spare_arena * tokens * token_bytes / 2**20))


def configuration(machine: Machine, model: str, plan: Plan, token_bytes: int) -> VllmConfig:
    """Both servers'."""
    pool = pool_blocks(machine)
    pool_bytes = pool * machine.block_size * token_bytes
    # Room for the answer, and no less than the CPU build has always had here.
    context = max(8192, -(-(plan.prompt_tokens + 256) // 1024) * 1024)
    config = VllmConfig(
        version=machine.version,
        model=model,
        gpu_blocks=pool,
        block_size=machine.block_size,
        max_model_len=context,
        dev_mode=False,
    )
    if machine.memory_share is not None:
        return dataclasses.replace(config, cuda=Cuda(machine.memory_share, pool_bytes))
    space = max(-(-pool_bytes // 2**30), 1)
    return dataclasses.replace(config, env=(("VLLM_CPU_KVCACHE_SPACE", str(space)),))


def measure(
    greenroom: Greenroom, plain: Plain, options: argparse.Namespace, keep: Callable[[list[Sample]], object]
) -> list[Sample]:
    """Rounds of all arms, each in an order of its own, until there are enough valid samples or time is up.

    What there is is kept now and then: the run may be cut off.
    """
    rng = random.Random(options.seed)
    samples: list[Sample] = []
    start = time.monotonic()
    for number in range(options.rounds + EXTRA_ROUNDS):
        enough = min(len(report.values(samples, arm)) for arm in ("resident", "reactive", "hinted")) >= options.rounds
        if enough or time.monotonic() - start > options.seconds:
            break
        arms = ["resident", "reactive", "hinted"] + (["recompute"] if number % RECOMPUTE_EVERY == 0 else [])
        rng.shuffle(arms)
        line = []
        for arm in arms:
            sample = plain.sample(number) if arm == "recompute" else greenroom.sample(arm, number)
            samples.append(sample)
            line.append(f"{arm} {sample.ttft_ms:.0f} ms" + (f" (INVALID: {sample.problem})" if sample.problem else ""))
        seconds = time.monotonic() - start
        say(f"  round {number + 1:>2} ({options.rounds} wanted), {seconds:>3.0f} s: " + " · ".join(line))
        if number % KEEP_EVERY == KEEP_EVERY - 1:
            keep(samples)
    return samples


def run(
    options: argparse.Namespace,
    plan: Plan,
    config: VllmConfig,
    memory: str,
    keep: Callable[[list[Sample]], object],
) -> list[Sample]:
    """Starts both servers at once, runs all arms, stops everything."""
    with contextlib.ExitStack() as stack:
        stock = VllmServer(config, None, "vLLM alone")
        stack.push(stock.__exit__)
        stock.launch()
        sidecar = stack.enter_context(Sidecar(memory))
        vllm = VllmServer(config, greenroom_transfer_config(socket=str(sidecar.socket)), "vLLM with Greenroom")
        stack.push(vllm.__exit__)
        vllm.launch()
        for server in (vllm, stock):
            server.wait_ready(say)
        greenroom, plain = Greenroom(Rig(vllm, sidecar), plan), Plain(stock, plan)
        say(f"First turns of {3 * plan.agents + plan.plain_agents} agents, {plan.prompt_tokens} tokens each …")
        greenroom.first_turns()
        plain.first_turns()
        say("Rounds: each arm once, in random order; the time is that to the first token of the turn after the tool.")
        return measure(greenroom, plain, options, keep)


def cores(machine: dict[str, Any]) -> str:
    return f"{machine['cores']} cores of {machine['cpu']}"


def main() -> int:
    options = arguments()
    began = time.monotonic()
    machine: Machine = options.machine
    plan = Plan(
        prompt_tokens=options.prompt_tokens,
        agents=machine.agents,
        seed=options.seed,
        flood_answer_tokens=machine.flood_answer_tokens,
        flood_spare=machine.flood_spare,
        block_size=machine.block_size,
    )
    folder = model_folder(options.model)
    token_bytes = kv_bytes_per_token(folder)
    config = configuration(machine, options.model, plan, token_bytes)
    memory = options.memory or f"{arena_mib(machine, plan, token_bytes)}MiB"
    pool = config.gpu_blocks
    say(f"Model {folder.name}: {token_bytes} bytes of KV per token; pool of {pool} blocks, arena of {memory}.")
    say("Starting the sidecar, vLLM with Greenroom and vLLM alone (about a minute; two on a busy machine) …")
    facts: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "demo", *sys.argv[1:]]),
        "seed": options.seed,
        "versions": {"vllm": vllm_version(config.version), "python": sys.version.split()[0]},
        "workload": {
            "model": json.loads((folder / "config.json").read_text()),
            "prompt_tokens": plan.prompt_tokens,
            "pool_blocks": pool,
            **({} if options.cuda else {"compute_cores": compute_cores()}),
            "flood": f"{FLOOD_AGENTS} agents at once, {machine.flood_tokens} tokens each",
            "arena": memory,
        },
    }

    def keep(samples: list[Sample]) -> dict[str, Any]:
        facts["seconds"] = round(time.monotonic() - began, 1)
        content = report.summary(samples, report.comparisons(samples, options.seed), facts, options.cuda)
        where = nvidia.description() if options.cuda else cores(content["machine"])
        build = facts["versions"]["vllm"] if options.cuda else f"{config.version} CPU build"
        caption = f"vLLM {build}, {plan.prompt_tokens}-token prompts, {where}"
        report.write(options.out, content, report.chart(samples, caption))
        return content

    samples = run(options, plan, config, memory, keep)
    content = keep(samples)
    made = report.comparisons(samples, options.seed)
    say("")
    say(report.table(samples, made, options.cuda))
    say("")
    say(f"{options.out / 'demo.json'}, {options.out / 'demo.svg'}; {facts['seconds']:.0f} s in all")
    for reason in content["reasons"]:
        say(f"INVALID: {reason}")
    return 0 if content["valid"] else 1


if __name__ == "__main__":
    sys.exit(main())
