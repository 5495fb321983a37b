"""A file of JSON lines that is still being written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Tail:
    """Reads on where it stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[Any]:
        """What is new. A line that is not complete yet is left for the next time."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self._offset += len(new)
        return [json.loads(line) for line in new.splitlines()]
