"""What both benchmarks leave: bars and reasons on the screen, everything in one JSON file. The layout is the demo's."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from demo import stats
from demo.report import Bar, commit, machine
from support.servers import vllm_version


def say(line: str) -> None:
    print(line, flush=True)


def rounded(value: float) -> float | None:
    """Four decimals: the bars are at two. JSON has no NaN."""
    return None if math.isnan(value) else round(value, 4)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Percentiles, and the values that they are of."""
    return {
        **{f"p{share}": rounded(stats.percentile(values, share / 100)) for share in (50, 95, 99)},
        "samples": len(values),
        "values": [rounded(value) for value in values],
    }


def comparison(made: stats.Comparison) -> dict[str, Any]:
    return {
        "a": made.a,
        "b": made.b,
        "p50_ratio": rounded(made.p50_ratio),
        "ci95": [rounded(bound) for bound in made.ci95],
        "pairs": made.pairs,
        "significant": made.significant(),
    }


def facts(seed: int, version: str) -> dict[str, Any]:
    """What a reader of the figures needs. Called before the servers start: the load is then that of others."""
    return {
        "machine": machine(),
        "commit": commit(),
        "command": shlex.join(["python", "-m", "serving", *sys.argv[1:]]),
        "seed": seed,
        "versions": {"vllm": vllm_version(version), "python": sys.version.split()[0]},
    }


def conclude(bars: Sequence[Bar], reasons: Sequence[str], content: Mapping[str, Any], path: Path | None) -> int:
    """Says how the bars stand and writes the file. The exit status: 1 for a missed bar and for a run without worth."""
    for bar in bars:
        say(f"{'met   ' if bar.met else 'MISSED'}  {bar.name}: {bar.value:.3f}, bar {bar.limit:g}")
    for reason in reasons:
        say(f"INVALID: {reason}")
    if path is not None:
        rows = [{"name": bar.name, "value": rounded(bar.value), "limit": bar.limit, "met": bar.met} for bar in bars]
        whole = {**content, "bars": rows, "valid": not reasons, "reasons": list(reasons)}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
        say(str(path))
    return 0 if not reasons and all(bar.met for bar in bars) else 1
