"""A soak's series as one SVG: a panel for each kind of figure, time from left to right, acts as thin lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from xml.sax.saxutils import escape

from campaign.soak import Sample, series

WIDTH, LEFT, RIGHT = 980, 70, 160
PANEL, GAP, TOP = 150, 34, 70
COLOURS = ("#15803d", "#1d4ed8", "#b91c1c", "#6b7280")

Line = tuple[str, list[tuple[float, float]]]


def lines(samples: Sequence[Sample]) -> list[tuple[str, list[Line]]]:
    """The panels: a title, and its lines."""
    roles = ("sidecar", "EngineCore", "Worker", "front end")
    made = [
        (f"{title}, {unit}" if unit else title, [(role, series(samples, role, what)) for role in roles])
        for title, unit, what in (
            ("anonymous memory", "MiB", "anon_mib"),
            ("resident memory (the worker's: with the arena)", "MiB", "rss_mib"),
            ("descriptors", "", "descriptors"),
            ("threads", "", "threads"),
        )
    ]
    # The sidecar is too small to be seen among the others.
    made.insert(1, ("anonymous memory of the sidecar, MiB", [("sidecar", series(samples, "sidecar", "anon_mib"))]))
    slots = [
        (state, [(one.at, float(one.slots[state])) for one in samples if one.slots])
        for state in ("used", "leased", "draining")
    ]
    made.append(("slots", slots))
    ttft = [(q, [(one.at, one.ttft_ms[q]) for one in samples if one.ttft_ms]) for q in ("p50", "p95")]
    return [*made, ("time to first token, ms", ttft)]


def draw(samples: Sequence[Sample], acts: Sequence[dict[str, Any]], half_s: float, caption: str) -> str:
    """The picture."""
    panels = lines(samples)
    end = max((one.at for one in samples), default=1.0)
    height = TOP + len(panels) * (PANEL + GAP)
    title = f"Soak: {end / 60:.0f} minutes, {len(acts)} acts (thin lines)"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(16, 28, title, size=17),
        _text(16, 48, caption, colour="#4b5563"),
    ]
    for number, (name, drawn) in enumerate(panels):
        top = TOP + number * (PANEL + GAP)
        parts.append(_text(LEFT, top - 6, name, size=13))
        parts += _panel(top, end, drawn, acts, half_s)
    parts.append("</svg>")
    return "\n".join(parts) + "\n"


def _panel(top: int, end: float, drawn: Sequence[Line], acts: Sequence[dict[str, Any]], half_s: float) -> list[str]:
    highest = max((value for _, points in drawn for _, value in points), default=0.0) * 1.05 or 1.0
    right, bottom = WIDTH - RIGHT, top + PANEL

    def x(at: float) -> float:
        return round(LEFT + at / end * (right - LEFT), 1)

    def y(value: float) -> float:
        return round(bottom - PANEL * value / highest, 1)

    size = f'y="{top}" height="{PANEL}"'
    parts = [
        f'<rect x="{LEFT}" {size} width="{right - LEFT}" fill="#f9fafb" stroke="#d1d5db"/>',
        f'<rect x="{x(half_s)}" {size} width="{max(right - x(half_s), 0):.1f}" fill="#ecfdf5"/>',
    ]
    for act in acts:
        at = x(act["at"])
        line = f'<line x1="{at}" y1="{top}" x2="{at}" y2="{bottom}" stroke="#d1d5db" stroke-width="0.6">'
        parts.append(f"{line}<title>{escape(act['act'])}</title></line>")
    parts += [_text(4, y(value) + 4, f"{value:,.0f}", size=10) for value in (0.0, highest / 2, highest)]
    for place, (name, points) in enumerate(drawn):
        path = " ".join(f"{x(at)},{y(value)}" for at, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[place]}" stroke-width="1.3"/>')
        parts.append(_text(right + 10, top + 16 + 16 * place, name, colour=COLOURS[place]))
    return parts


def _text(x: float, y: float, text: str, size: int = 12, colour: str = "#111827") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}">{escape(text)}</text>'
