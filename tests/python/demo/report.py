"""What the demo leaves: a table, JSON and a bar chart."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from demo.arms import ARMS, Sample
from demo.stats import Comparison, compare, percentile
from support import nvidia
from support.paths import ROOT

COMPARISONS = (
    ("hinted", "resident"),
    ("reactive", "resident"),
    ("recompute", "hinted"),
    ("recompute", "reactive"),
)
SAMPLES_MIN = {"resident": 30, "hinted": 30, "reactive": 30, "recompute": 5}
LABELS = {
    "resident": "KV never evicted",
    "recompute": "Greenroom off: recomputed",
    "reactive": "no hints: loaded on request",
    "hinted": "hinted: back before the request",
}


@dataclasses.dataclass(frozen=True)
class Bar:
    """One of the project's bars and whether this run meets it."""

    name: str
    value: float
    limit: float
    met: bool


def values(samples: Sequence[Sample], arm: str) -> dict[int, float]:
    """Round → TTFT in milliseconds of the arm's valid samples."""
    return {sample.round: sample.ttft_ms for sample in samples if sample.arm == arm and sample.problem is None}


def comparisons(samples: Sequence[Sample], seed: int) -> list[Comparison]:
    made = []
    for a, b in COMPARISONS:
        left, right = values(samples, a), values(samples, b)
        pairs = [(left[each], right[each]) for each in sorted(left.keys() & right.keys())]
        made.append(compare((a, b), pairs, seed))
    return made


def bars(made: Sequence[Comparison], cuda: bool = False) -> list[Bar]:
    """What a recomputed turn costs depends on the machine: those two bars are the CPU build's."""
    by_name = {(each.a, each.b): each for each in made}
    upper = by_name["hinted", "resident"].ci95[1]
    hinted = by_name["recompute", "hinted"].p50_ratio
    reactive = by_name["recompute", "reactive"].p50_ratio
    back = Bar("hinted ÷ resident, upper 95 % bound of the P50 ratio", upper, 1.10, upper <= 1.10)
    gain = [
        Bar("recompute ÷ hinted, P50", hinted, 15, hinted >= 15),
        Bar("recompute ÷ reactive, P50", reactive, 4, reactive >= 4),
    ]
    return [back] if cuda else [back, *gain]


def reasons(samples: Sequence[Sample]) -> list[str]:
    """Why the run proves nothing; empty if it is valid."""
    found = []
    for arm in ARMS:
        valid = len(values(samples, arm))
        if valid < SAMPLES_MIN[arm]:
            problems = sorted({sample.problem for sample in samples if sample.arm == arm and sample.problem})
            found.append(f"{arm}: {valid} valid samples of {SAMPLES_MIN[arm]} wanted. " + "; ".join(problems[:3]))
    return found


def machine() -> dict[str, Any]:
    """The machine, in the words that a reader of the figures needs."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    meminfo = Path("/proc/meminfo").read_text()
    memory_kib = int(meminfo.split("MemTotal:")[1].split()[0])
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
        "load_1min": round(os.getloadavg()[0], 2),
        **({"gpu": nvidia.description()} if nvidia.is_present() else {}),
    }


def commit() -> str:
    """What `GREENROOM_COMMIT` says, for copies of the checkout; else the checkout's commit, with `-dirty` where files
    differ from it, or `unknown`."""
    told = os.environ.get("GREENROOM_COMMIT")
    if told:
        return told
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    with contextlib.suppress(FileNotFoundError):
        said = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return said or "unknown"
    return "unknown"


def summary(
    samples: Sequence[Sample], made: Sequence[Comparison], run: dict[str, Any], cuda: bool = False
) -> dict[str, Any]:
    """The content of the JSON file. `run` is what the caller knows: command, seed, versions, workload."""
    arms = {}
    for arm in ARMS:
        times = list(values(samples, arm).values())
        cached = [sample.cached_tokens for sample in samples if sample.arm == arm and sample.problem is None]
        arms[arm] = {
            "ttft_ms": {
                "p50": _rounded(percentile(times, 0.5)),
                "p95": _rounded(percentile(times, 0.95)),
                "samples": len(times),
                "values": [_rounded(each) for each in times],
            },
            "cached_tokens": statistics.median_low(cached) if cached else None,
            "invalid": [dataclasses.asdict(sample) for sample in samples if sample.arm == arm and sample.problem],
        }
    ready = [sample.ready_ms for sample in samples if sample.ready_ms is not None and sample.problem is None]
    arms["hinted"]["ready_ms_after_tool_end"] = {
        "p50": _rounded(percentile(ready, 0.5)),
        "p95": _rounded(percentile(ready, 0.95)),
    }
    return {
        "arms": arms,
        "comparisons": [
            {
                "a": each.a,
                "b": each.b,
                "p50_ratio": _rounded(each.p50_ratio),
                "ci95": [_rounded(bound) for bound in each.ci95],
                "pairs": each.pairs,
                "significant": each.significant(),
            }
            for each in made
        ],
        "bars": [
            {"name": bar.name, "value": _rounded(bar.value), "limit": bar.limit, "met": bar.met}
            for bar in bars(made, cuda)
        ],
        "valid": not reasons(samples),
        "reasons": reasons(samples),
        "machine": machine(),
        "commit": commit(),
        **run,
    }


def _rounded(value: float) -> float | None:
    """Three decimals; JSON has no NaN."""
    return None if math.isnan(value) else round(value, 3)


def table(samples: Sequence[Sample], made: Sequence[Comparison], cuda: bool = False) -> str:
    """For people."""
    lines = [f"{'arm':<10} {'':<32} {'TTFT P50':>10} {'P95':>10} {'cached':>7} {'samples':>8} {'invalid':>8}"]
    for arm in ARMS:
        times = list(values(samples, arm).values())
        cached = sorted({sample.cached_tokens for sample in samples if sample.arm == arm and sample.problem is None})
        invalid = sum(1 for sample in samples if sample.arm == arm and sample.problem)
        lines.append(
            f"{arm:<10} {LABELS[arm]:<32} {percentile(times, 0.5):>7.1f} ms {percentile(times, 0.95):>7.1f} ms"
            f" {'/'.join(map(str, cached)) or '-':>7} {len(times):>8} {invalid:>8}"
        )
    lines.append("")
    for each in made:
        name = f"{each.a} ÷ {each.b}"
        interval = f"{each.ci95[0]:.3f} to {each.ci95[1]:.3f}"
        lines.append(f"{name:<24} P50 ratio {each.p50_ratio:8.3f}   95 % {interval}, {each.pairs} pairs")
    lines.append("")
    for bar in bars(made, cuda):
        lines.append(f"{'met    ' if bar.met else 'NOT met'}  {bar.name}: {bar.value:.3f}, bar {bar.limit:g}")
    return "\n".join(lines)


def chart(samples: Sequence[Sample], caption: str) -> str:
    """P50 as bars, P95 as a mark, as SVG. Linear scale: the difference is the message."""
    width, left, row, top = 760, 230, 46, 64
    p50 = {arm: percentile(list(values(samples, arm).values()), 0.5) for arm in ARMS}
    p95 = {arm: percentile(list(values(samples, arm).values()), 0.95) for arm in ARMS}
    longest = max((value for value in p95.values() if not math.isnan(value)), default=1.0)
    scale = (width - left - 110) / longest
    colours = {"resident": "#6b7280", "recompute": "#b91c1c", "reactive": "#d97706", "hinted": "#15803d"}
    height = top + row * len(ARMS) + 34
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        '<text x="16" y="28" font-size="17" fill="#111827">TTFT after a tool wait (bar: P50, mark: P95)</text>',
        f'<text x="16" y="48" font-size="12" fill="#4b5563">{escape(caption)}</text>',
    ]
    for place, arm in enumerate(ARMS):
        y = top + place * row
        parts.append(f'<text x="16" y="{y + 20}" font-size="13" fill="#111827">{escape(arm)}</text>')
        parts.append(f'<text x="16" y="{y + 35}" font-size="11" fill="#6b7280">{escape(LABELS[arm])}</text>')
        if math.isnan(p50[arm]):
            parts.append(f'<text x="{left}" y="{y + 25}" font-size="13" fill="#b91c1c">no valid sample</text>')
            continue
        bar = max(p50[arm] * scale, 1.5)
        mark = left + p95[arm] * scale
        parts.append(f'<rect x="{left}" y="{y + 8}" width="{bar:.1f}" height="24" fill="{colours[arm]}"/>')
        parts.append(f'<rect x="{mark:.1f}" y="{y + 4}" width="1.5" height="32" fill="#111827"/>')
        text = max(left + bar, mark) + 8
        parts.append(f'<text x="{text:.1f}" y="{y + 25}" font-size="13" fill="#111827">{p50[arm]:,.0f} ms</text>')
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def write(folder: Path, content: dict[str, Any], picture: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    (folder / "demo.svg").write_text(picture)
