"""`python -m serving hint-latency|throughput`: see `make bench-serving`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from serving import hint_latency, throughput


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m serving", description="Benchmarks that need a real vLLM.")
    names = parser.add_subparsers(dest="name", required=True)
    hint = names.add_parser("hint-latency", help="from a client's hint to the copy, on an idle engine")
    hint.add_argument("--samples", type=int, default=hint_latency.SAMPLES, help="hints, and as many empty steps")
    hint.add_argument("--idle", type=float, default=hint_latency.IDLE_S, help="seconds without a step before a sample")
    hint.set_defaults(seconds=hint_latency.SECONDS, main=hint_latency.main)
    load = names.add_parser("throughput", help="with Greenroom against without it, nothing to reuse")
    load.add_argument("--rounds", type=int, default=throughput.ROUNDS, help="starts of the two servers")
    load.set_defaults(seconds=throughput.SECONDS, main=throughput.main)
    for each in (hint, load):
        each.add_argument("--json", type=Path, help="file for the figures")
        each.add_argument("--seed", type=int, default=1)
        each.add_argument("--seconds", type=float, help="nothing new begins after this time, the servers' start apart")
    return parser.parse_args()


if __name__ == "__main__":
    options = arguments()
    sys.exit(options.main(options))
