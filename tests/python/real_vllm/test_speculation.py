"""Speculative decoding: most of the drafts behind the known tokens are taken back; only what stays is saved."""

from __future__ import annotations

import dataclasses
import json

from real_vllm import steps
from real_vllm.audit import Follower
from real_vllm.rigs import AUDITED, PATIENT, PLAIN
from support.completions import Ask
from support.engines import Engines
from support.flood import prompt

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 4}
SPECULATING = dataclasses.replace(AUDITED, args=("--speculative-config", json.dumps(DRAFTS)))
BLOCKS = 12
ANSWER_TOKENS = 3 * steps.BLOCK


def test_kv_comes_back_to_an_engine_that_drafts(engines: Engines, witness: Follower) -> None:
    _, rig = engines.both(PLAIN, SPECULATING, **PATIENT)
    first = Ask(prompt("draft", steps.tokens_of(BLOCKS)), ANSWER_TOKENS, session="draft")
    answer = steps.first_turn(rig, first)
    assert [answer.tokens] == steps.right(engines, first)
    assert rig.vllm.metrics().sum("vllm:spec_decode_num_drafts_total") > 0
    # The last token's KV is never computed.
    full = (len(first.prompt) + ANSWER_TOKENS - 1) // steps.BLOCK
    steps.wait_saved(rig, "draft", full)
    steps.evict(rig, "draft")
    second = Ask([*first.prompt, *answer.tokens, *prompt("result", 40)], ANSWER_TOKENS, session="draft")
    before = rig.vllm.loaded()
    again = rig.vllm.ask(second)
    assert again.cached_tokens == full * steps.BLOCK
    assert rig.vllm.loaded() - before >= (full - steps.LEFT_MAX) * steps.BLOCK
    assert [again.tokens] == steps.right(engines, second)
    assert not witness.audit().problems
