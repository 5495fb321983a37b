"""HTTP for tests: the standard library only, every call bounded."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import urlsplit


class HttpError(RuntimeError):
    """An answer that is not 2xx."""

    def __init__(self, method: str, url: str, status: int, body: str) -> None:
        super().__init__(f"{method} {url}: {status}: {body[:500]}")
        self.status = status
        self.body = body


def open_connection(url: str, timeout_s: float) -> tuple[http.client.HTTPConnection, str]:
    """A connection to the URL's host, not yet opened, and the path to ask for."""
    parts = urlsplit(url)
    path = parts.path or "/"
    if parts.query:
        path += "?" + parts.query
    return http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=timeout_s), path


def raw(
    method: str, url: str, body: bytes | None = None, headers: dict[str, str] | None = None, timeout_s: float = 30
) -> tuple[int, str]:
    """Status and text of any answer; raises `OSError` only."""
    connection, path = open_connection(url, timeout_s)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    except http.client.HTTPException as error:
        raise ConnectionError(f"{method} {url}: {error!r}") from error
    finally:
        connection.close()


def text(method: str, url: str, timeout_s: float = 30) -> str:
    """The body of a 2xx answer."""
    status, body = raw(method, url, timeout_s=timeout_s)
    if not 200 <= status < 300:
        raise HttpError(method, url, status, body)
    return body


def call(method: str, url: str, body: Any = None, headers: dict[str, str] | None = None, timeout_s: float = 30) -> Any:
    """JSON in, JSON out (None for an empty body); raises `HttpError` unless 2xx."""
    data = None if body is None else json.dumps(body).encode()
    status, answer = raw(method, url, data, {"content-type": "application/json", **(headers or {})}, timeout_s)
    if not 200 <= status < 300:
        raise HttpError(method, url, status, answer)
    return json.loads(answer) if answer.strip() else None


def is_up(url: str) -> bool:
    """Whether the URL answers 2xx within two seconds."""
    try:
        return 200 <= raw("GET", url, timeout_s=2)[0] < 300
    except OSError:
        return False
