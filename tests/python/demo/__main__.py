"""`python -m demo`: see `make demo`."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from demo import report
from demo.arms import FLOOD_AGENTS, Greenroom, Plain, Plan, Sample
from support.make_model import kv_bytes_per_token
from support.paths import ROOT
from support.servers import (
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

FLOOD_TOKENS = 5000


def say(line: str) -> None:
    print(line, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make demo", description="TTFT after a tool wait, four arms, real vLLM.")
    parser.add_argument("--model", default="demo", help="folder of a model; default: a small random one is made")
    parser.add_argument("--rounds", type=int, default=30, help="rounds of all arms (default 30)")
    parser.add_argument("--seconds", type=float, default=330, help="no new round begins after this time (default 330)")
    parser.add_argument("--prompt-tokens", type=int, default=6000, help="length of a turn (default 6000)")
    parser.add_argument("--memory", help="size of the arena; default: what the workload needs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "target", help="folder for demo.json and demo.svg")
    return parser.parse_args()


def pool_blocks(block_size: int) -> int:
    """A pool that the flood's agents fill together, each with a turn of `FLOOD_TOKENS`."""
    return 1 + FLOOD_AGENTS + FLOOD_AGENTS * -(-FLOOD_TOKENS // block_size)


def arena_mib(plan: Plan, token_bytes: int) -> int:
    """Twice what the agents and the flood save."""
    tokens = 3 * plan.agents * (plan.prompt_tokens + 64) + FLOOD_AGENTS * (FLOOD_TOKENS + 64)
    return max(256, -(-2 * tokens * token_bytes // 2**20))


def measure(greenroom: Greenroom, plain: Plain, options: argparse.Namespace) -> list[Sample]:
    """Rounds of all arms, each in an order of its own, until there are enough valid samples or time is up."""
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
    return samples


def run(options: argparse.Namespace, plan: Plan, config: VllmConfig, memory: str) -> list[Sample]:
    """Starts both servers at once, runs all arms, stops everything."""
    with contextlib.ExitStack() as stack:
        sidecar = stack.enter_context(Sidecar(memory))
        vllm = VllmServer(config, greenroom_transfer_config(socket=str(sidecar.socket)), "vLLM with Greenroom")
        stock = VllmServer(config, None, "vLLM alone")
        for server in (vllm, stock):
            stack.push(server.__exit__)
            server.launch()
        for server in (vllm, stock):
            server.wait_ready(say)
        greenroom, plain = Greenroom(Rig(vllm, sidecar), plan), Plain(stock, plan)
        say(f"First turns of {3 * plan.agents + plan.plain_agents} agents, {plan.prompt_tokens} tokens each …")
        greenroom.first_turns()
        plain.first_turns()
        say("Rounds: each arm once, in random order; the time is that to the first token of the turn after the tool.")
        return measure(greenroom, plain, options)


def main() -> int:
    options = arguments()
    began = time.monotonic()
    plan = Plan(prompt_tokens=options.prompt_tokens, seed=options.seed)
    folder = model_folder(options.model)
    token_bytes = kv_bytes_per_token(folder)
    pool = pool_blocks(plan.block_size)
    space = -(-pool * plan.block_size * token_bytes // 2**30)
    config = VllmConfig(
        model=str(folder), gpu_blocks=pool, dev_mode=False, env=(("VLLM_CPU_KVCACHE_SPACE", str(max(space, 1))),)
    )
    memory = options.memory or f"{arena_mib(plan, token_bytes)}MiB"
    say(f"Model {folder.name}: {token_bytes} bytes of KV per token; pool of {pool} blocks, arena of {memory}.")
    say("Starting the sidecar, vLLM with Greenroom and vLLM alone (about a minute; two on a busy machine) …")
    samples = run(options, plan, config, memory)
    made = report.comparisons(samples, options.seed)
    facts: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "demo", *sys.argv[1:]]),
        "seed": options.seed,
        "versions": {"vllm": vllm_version(config.version), "python": sys.version.split()[0]},
        "workload": {
            "model": json.loads((folder / "config.json").read_text()),
            "prompt_tokens": plan.prompt_tokens,
            "pool_blocks": pool,
            "compute_cores": compute_cores(),
            "flood": f"{FLOOD_AGENTS} agents at once, {FLOOD_TOKENS} tokens each",
            "arena": memory,
        },
        "seconds": round(time.monotonic() - began, 1),
    }
    content = report.summary(samples, made, facts)
    seen = content["machine"]
    caption = f"{config.version} CPU build, {plan.prompt_tokens}-token prompts, {seen['cores']} cores of {seen['cpu']}"
    report.write(options.out, content, report.chart(samples, "vLLM " + caption))
    say("")
    say(report.table(samples, made))
    say("")
    say(f"{options.out / 'demo.json'}, {options.out / 'demo.svg'}; {facts['seconds']:.0f} s in all")
    for reason in content["reasons"]:
        say(f"INVALID: {reason}")
    return 0 if content["valid"] else 1


if __name__ == "__main__":
    sys.exit(main())
