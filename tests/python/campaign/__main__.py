"""`python -m campaign faults` and `python -m campaign soak`: see `make faults` and `make soak`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import random
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from campaign import chart, soak
from campaign.hook_times import HOOK_TIMES, HookTimes
from campaign.plan import DEATH_EVERY, draw
from campaign.runner import Failed, prepare
from campaign.tally import Row, Tally, rows, table, wrongs
from demo.report import commit, machine
from real_vllm.audit import Follower
from real_vllm.rigs import AUDIT_LOG
from support.engines import Engines
from support.paths import ROOT
from support.servers import vllm_version

TWO_RANKS_SHARE = 0.2
"""Of the rounds."""
TWO_RANKS_DEATH_EVERY = 3
SOAK_MEMORY = "192MiB"
"""So small that blocks are evicted, and large enough for a round and its probe."""


def say(line: str) -> None:
    print(line, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m campaign", description="Real servers under deaths and shortages.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, minutes, text in (("faults", 40.0, "random acts, round by round"), ("soak", 60.0, "for a long time")):
        sub = kinds.add_parser(kind, help=text)
        sub.add_argument("--minutes", type=float, default=minutes, help=f"no round begins later (default {minutes:g})")
        sub.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
        sub.add_argument("--out", type=Path, default=ROOT / "target", help=f"folder for {kind}.json")
    kinds.choices["faults"].add_argument("--rounds", type=int, default=100, help="rounds at most (default 100)")
    return parser.parse_args()


def run_faults(options: argparse.Namespace, engines: Engines, witness: Follower, tally: Tally) -> list[Row]:
    """Rounds on one rank, then on two; a part that there was no time for is no success. Raises `Failed`."""
    until = time.monotonic() + options.minutes * 60
    two = round(options.rounds * TWO_RANKS_SHARE)
    made = []
    for ranks, rounds, death_every in ((1, options.rounds - two, DEATH_EVERY), (2, two, TWO_RANKS_DEATH_EVERY)):
        if not rounds:
            continue
        before = tally.acts.total()
        if time.monotonic() <= until:
            acts = itertools.islice(draw(options.seed + ranks, death_every=death_every), rounds)
            in_time = itertools.takewhile(lambda _: time.monotonic() <= until, acts)
            prepare(engines, witness, tally, say, options.seed, ranks).run(in_time)
        done = tally.acts.total() - before
        made.append(Row(f"rounds on {ranks} ranks", f"{done} of {rounds}", done > 0))
    return made


def run_soak(
    options: argparse.Namespace, engines: Engines, witness: Follower, tally: Tally, content: dict[str, Any]
) -> list[Row]:
    """Raises `Failed`."""
    campaign = prepare(engines, witness, tally, say, options.seed, memory=SOAK_MEMORY)
    samples, acts, half_s = soak.run(campaign, options.seed, options.minutes)
    campaign.last()
    content.update(half_s=round(half_s, 1), acts=acts, samples=[dataclasses.asdict(one) for one in samples])
    seen = machine()
    caption = (
        f"vLLM {vllm_version('0.32')} CPU build with Greenroom, {seen['cores']} cores of {seen['cpu']}, arena of"
        f" {SOAK_MEMORY}; green: the second half, in which growth is judged; processes are ended in the first third"
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "soak.svg").write_text(chart.draw(samples, acts, half_s, caption))
    return [soak.latency(tally), *soak.judge(samples, half_s)]


def finish(options: argparse.Namespace, made: Sequence[Row], tally: Tally, content: dict[str, Any]) -> bool:
    """Prints and writes the summary; whether all is well."""
    say("")
    say(table(made))
    for wrong in wrongs(tally):
        say(f"WRONG: {wrong}")
    well = all(row.ok is not False for row in made)
    whole = {
        "command": shlex.join(["python", "-m", "campaign", *sys.argv[1:]]),
        "seed": options.seed,
        "well": well,
        "rows": [dataclasses.asdict(row) for row in made],
        "wrong": wrongs(tally),
        "machine": machine(),
        "commit": commit(),
        **content,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.kind}.json"
    path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    say(f"{path}; seed {options.seed}: " + ("all is well" if well else "something is WRONG"))
    return well


def main() -> int:
    options = arguments()
    for log in (AUDIT_LOG, HOOK_TIMES):
        log.unlink(missing_ok=True)
    began = time.monotonic()
    tally, content = Tally(), dict[str, Any]()
    engines = Engines(say)
    more: list[Row] = []
    say(f"seed {options.seed}")
    try:
        witness = Follower(AUDIT_LOG)
        if options.kind == "faults":
            more = run_faults(options, engines, witness, tally)
        else:
            more = run_soak(options, engines, witness, tally, content)
    except Failed:
        more = [Row("it could not go on", wrongs(tally)[-1], False)]
    finally:
        engines.close()
    tally.problems += engines.wrongly_said
    content["seconds"] = round(time.monotonic() - began, 1)
    made = [*rows(tally, HookTimes().read()), *more]
    return 0 if finish(options, made, tally, content) else 1


if __name__ == "__main__":
    sys.exit(main())
