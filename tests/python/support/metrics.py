"""Reads Prometheus text."""

from __future__ import annotations

import re
from collections.abc import Iterator

_LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.rows: list[tuple[str, dict[str, str], float]] = []
        for line in text.splitlines():
            match = _LINE.match(line)
            if match:
                self.rows.append((match["name"], dict(_LABEL.findall(match["labels"] or "")), float(match["value"])))

    def matching(self, name: str, **labels: str) -> Iterator[tuple[dict[str, str], float]]:
        """All series of that name with at least these labels."""
        for row, has, value in self.rows:
            if row == name and all(has.get(key) == wanted for key, wanted in labels.items()):
                yield has, value

    def sum(self, name: str, **labels: str) -> float:
        """Sum over the matching series; 0 if there is none, as of a counter that has not counted yet."""
        return sum(value for _, value in self.matching(name, **labels))

    def names(self) -> set[str]:
        return {row for row, _, _ in self.rows}
