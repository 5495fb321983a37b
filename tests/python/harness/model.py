"""A model whose KV says what it was computed from: every token's entry is a digest of all tokens up to it.

Computing a token reads the entry before it from the paged pool, as attention reads all of them: a wrong block goes on
into everything that is computed after it, and the next token is drawn from the last entry.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

Entries = Any
"""A numpy array of bytes: KV entries, one row of ``TOKEN_BYTES`` for each token."""

TOKEN_BYTES = 64
VOCABULARY = 1000


def first_entry(weights: int) -> bytes:
    """What stands before the first token."""
    return hashlib.blake2b(b"weights %d" % weights).digest()


def next_entry(before: bytes, token: int) -> bytes:
    """The entry of a token."""
    return hashlib.blake2b(before + token.to_bytes(4, "little")).digest()


def next_token(entry: bytes) -> int:
    """The token that follows, greedily."""
    return int.from_bytes(entry[:4], "little") % VOCABULARY


class Truth:
    """The entries of a growing sequence, computed from its tokens alone."""

    def __init__(self, weights: int) -> None:
        self.weights = weights
        self.tokens: list[int] = []
        self._entries: Entries = np.empty((64, TOKEN_BYTES), np.uint8)

    def of(self, tokens: Sequence[int]) -> Entries:
        """The entries of ``tokens``; what they share with the last call is not computed again."""
        shared = self._shared(tokens)
        while len(self._entries) < len(tokens):
            self._entries = np.concatenate([self._entries, np.empty_like(self._entries)])
        before = self._entries[shared - 1].tobytes() if shared else first_entry(self.weights)
        for position in range(shared, len(tokens)):
            before = next_entry(before, tokens[position])
            self._entries[position] = np.frombuffer(before, np.uint8)
        self.tokens[shared:] = tokens[shared:]
        return self._entries[: len(tokens)]

    def _shared(self, tokens: Sequence[int]) -> int:
        if self.tokens[: len(tokens)] == list(tokens[: len(self.tokens)]):
            return min(len(tokens), len(self.tokens))
        pairs = enumerate(zip(self.tokens, tokens, strict=False))
        return next((position for position, (one, other) in pairs if one != other), min(len(self.tokens), len(tokens)))


class Pool:
    """The paged KV pool: one layer, ``block_tokens`` entries to a block; each rank has its part of every entry.

    In memory that processes can share.
    """

    def __init__(self, blocks: int, block_tokens: int, ranks: int) -> None:
        self.block_tokens = block_tokens
        self.shards = [Shard(blocks, block_tokens, TOKEN_BYTES // ranks) for _ in range(ranks)]

    def digest(self, block: int) -> bytes:
        """Of all bytes of a block."""
        return hashlib.blake2b(
            b"".join(shard.entries[block].tobytes() for shard in self.shards), digest_size=16
        ).digest()

    def sequence(self, blocks: Sequence[int], tokens: int) -> Entries:
        """The entries that a request with this block table has, a copy."""
        used = list(blocks[: -(-tokens // self.block_tokens)])
        found = np.concatenate([shard.entries[used] for shard in self.shards], axis=-1)
        return found.reshape(-1, TOKEN_BYTES)[:tokens]

    def compute(self, blocks: Sequence[int], start: int, tokens: Sequence[int], weights: int) -> int:
        """Writes the entries of ``tokens`` from position ``start`` on; returns the token that follows."""
        before = self._entry(blocks, start - 1) if start else first_entry(weights)
        for position, token in enumerate(tokens, start):
            before = next_entry(before, token)
            block, offset = divmod(position, self.block_tokens)
            parts = np.split(np.frombuffer(before, np.uint8), len(self.shards))
            for shard, part in zip(self.shards, parts, strict=True):
                shard.entries[blocks[block], offset] = part
        return next_token(before)

    def _entry(self, blocks: Sequence[int], position: int) -> bytes:
        block, offset = divmod(position, self.block_tokens)
        return b"".join(shard.entries[blocks[block], offset].tobytes() for shard in self.shards)

    def close(self) -> None:
        """The memory goes with the last process that has mapped it."""
        for shard in self.shards:
            os.close(shard.descriptor)


class Shard:
    """One rank's part of the pool: ``entries`` of shape (blocks, block_tokens, entry_bytes)."""

    def __init__(self, blocks: int, block_tokens: int, entry_bytes: int) -> None:
        self.shape = (blocks, block_tokens, entry_bytes)
        self.descriptor = os.memfd_create("kv")
        os.ftruncate(self.descriptor, blocks * block_tokens * entry_bytes)
        self.entries = entries_of(self.descriptor, self.shape)


def entries_of(descriptor: int, shape: tuple[int, ...]) -> Entries:
    """Maps a shard's memory."""
    return np.frombuffer(mmap.mmap(descriptor, 0), np.uint8).reshape(shape)
