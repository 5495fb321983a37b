"""Requests to vLLM by token ids: greedy, streamed, with the figures that tests read."""

from __future__ import annotations

import dataclasses
import http.client
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from support.rest import HttpError, open_connection

MODEL_NAME = "model"
"""What every server under test calls its model."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One turn. `extra` goes into the body as it is (`kv_transfer_params`, `kv_hints`, `cache_salt`, …)."""

    prompt: Sequence[int]
    max_tokens: int = 8
    session: str | None = None
    request_id: str | None = None
    logprobs: int | None = None
    model: str = MODEL_NAME
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def headers(self) -> dict[str, str]:
        named = {"X-Session-ID": self.session, "X-Request-Id": self.request_id}
        return {"content-type": "application/json", **{key: value for key, value in named.items() if value is not None}}

    def body(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.logprobs is not None:
            body["logprobs"] = self.logprobs
            body["return_tokens_as_token_ids"] = True
        return {**body, **self.extra}


@dataclasses.dataclass(frozen=True)
class Completion:
    """What came back. `ttft_s` ends when the first token arrives; `top` is token id → log probability per position."""

    tokens: list[int]
    ttft_s: float
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    finish_reason: str | None
    top: list[dict[int, float]]

    def margins(self) -> list[float]:
        """Distance of the two best tokens per position; needs `logprobs` of 2 or more."""
        ranked = [sorted(row.values(), reverse=True) for row in self.top]
        return [row[0] - row[1] for row in ranked]


class Stream:
    """A request in progress. Leaving the `with` block before its end closes the connection: vLLM aborts the request."""

    def __init__(self, base_url: str, ask: Ask, timeout_s: float) -> None:
        self._connection, path = open_connection(base_url + "/v1/completions", timeout_s)
        payload = json.dumps(ask.body())
        self._connection.connect()
        self._start = time.perf_counter()
        self._connection.request("POST", path, payload, ask.headers())
        self._answer: http.client.HTTPResponse | None = None
        self._url = base_url + path
        self.tokens: list[int] = []
        self.top: list[dict[int, float]] = []
        self.arrivals: list[float] = []
        """`time.perf_counter()` at each token's arrival."""
        self.usage: dict[str, Any] = {}
        self.finish_reason: str | None = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        if self._answer is not None:
            # It holds the socket open, too.
            self._answer.close()
        self._connection.close()

    def __iter__(self) -> Iterator[list[int]]:
        """The new token ids of each chunk, as they arrive."""
        if self._answer is None:
            self._answer = self._connection.getresponse()
            if self._answer.status != 200:
                raise HttpError("POST", self._url, self._answer.status, self._answer.read().decode(errors="replace"))
        for line in self._answer:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                new = self._take(json.loads(line[6:]))
                if new:
                    self.tokens += new
                    self.arrivals += [now] * len(new)
                    yield new

    def _take(self, chunk: dict[str, Any]) -> list[int]:
        if "error" in chunk:
            raise HttpError("POST", self._url, 500, json.dumps(chunk["error"]))
        self.usage = chunk.get("usage") or self.usage
        new: list[int] = []
        for choice in chunk.get("choices", ()):
            new += choice.get("token_ids") or ()
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            for row in (choice.get("logprobs") or {}).get("top_logprobs") or ():
                self.top.append({int(name.removeprefix("token_id:")): value for name, value in row.items()})
        return new

    def finish(self) -> Completion:
        """Reads to the end. A stream that breaks off raises `ConnectionError`."""
        try:
            for _ in self:
                pass
        except http.client.HTTPException as error:
            raise ConnectionError(f"the stream broke off after {len(self.tokens)} tokens: {error!r}") from error
        if not self.usage:
            raise ConnectionError(f"the stream ended after {len(self.tokens)} tokens and without its usage")
        return Completion(
            tokens=self.tokens,
            ttft_s=self.arrivals[0] - self._start if self.arrivals else float("nan"),
            total_s=time.perf_counter() - self._start,
            prompt_tokens=self.usage["prompt_tokens"],
            cached_tokens=(self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            finish_reason=self.finish_reason,
            top=self.top,
        )


def complete(base_url: str, ask: Ask, timeout_s: float = 300) -> Completion:
    """Asks and waits for the whole answer."""
    with Stream(base_url, ask, timeout_s) as stream:
        return stream.finish()
