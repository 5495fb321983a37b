"""What a server's log must not say: a prompt, a token, a path other than the socket's in a line of Greenroom's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from support.paths import ROOT

HEAD_TOKENS = 8
"""Tokens of a prompt that are looked for: so many in a row are nobody else's."""

Head = tuple[int, ...]

_NUMBERS = re.compile(rf"\d+(?:[,\s]+\d+){{{HEAD_TOKENS - 1},}}")
_OUR_LINE = re.compile(r"\d{4}-\d\d-\d\dT[\d:.]+Z +(?:ERROR|WARN|INFO|DEBUG|TRACE) .*$", re.MULTILINE)
"""Of the native module, or of a sidecar that shares the log. vLLM's own lines have another date, and name its files."""
_SOCKET = re.compile(r"\bsocket=\S+")
_ROOTS = "tmp|home|root|proc|sys|run|dev|etc|var|usr|opt|srv|mnt|data|" + ROOT.parts[1]
_PATH = re.compile(rf"(?<![\w./])/(?:{_ROOTS})\b\S*")


def head(prompt: Sequence[int]) -> Head:
    """What a prompt is known by: its first tokens, or none where it is too short to be known."""
    return tuple(prompt[:HEAD_TOKENS]) if len(prompt) >= HEAD_TOKENS else ()


def our_lines(log: str) -> list[str]:
    """What the native module and a sidecar that shares the log have said, from the date on."""
    return _OUR_LINE.findall(log)


def wrongly_said(log: str, heads: Iterable[Head], secrets: Iterable[str] = ()) -> list[str]:
    """All that this log should not hold, in words."""
    known = set(heads) - {()}
    found = []
    for run in _NUMBERS.findall(log):
        numbers = [int(number) for number in re.findall(r"\d+", run)]
        windows = zip(*(numbers[start:] for start in range(HEAD_TOKENS)), strict=False)
        found += [f"a prompt: {run[:80]}" for window in windows if window in known]
    found += ["a token" for secret in secrets if secret in log]
    for line in our_lines(log):
        found += [f"the path {path}: {line[:200]}" for path in _PATH.findall(_SOCKET.sub("", line))]
    return found
