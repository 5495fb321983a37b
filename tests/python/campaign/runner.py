"""One round after the other: load, an act in the middle of copies, then everything must be as if nothing had been."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterable

from campaign.acts import Acts, stopped
from campaign.hook_times import HookTimes
from campaign.load import Load
from campaign.plan import NEW_ARENA, Act
from campaign.servers import (
    OTHER_WEIGHTS,
    WEIGHTS,
    Mortal,
    engine,
    plain,
    sidecar_of,
    workers,
    write_weights,
)
from campaign.tally import Tally
from real_vllm import steps
from real_vllm.audit import Follower
from support import rest
from support.completions import Ask, Completion
from support.engines import Engines
from support.flood import prompt
from support.process import ProcessFailed, wait_until
from support.rest import raw
from support.servers import Rig, Say

TURNS = 120
"""Of the story; its answers are computed once, and it is told again and again."""
WAVES = 8
"""Of a round, at least; more come until its act is done."""
WAVES_MAX = 20
"""If no copy could be met in so many waves, the act is done without."""
PROBE_BLOCKS = 20
PROBE_TRIES = 10
"""A lookup that a busy machine answers too late is a miss: then the probe is asked again."""
ENDED_S = 20.0
"""vLLM's own end, after one of its processes has died; then it is killed."""
DRAINED_S = 30.0
SETTLED_S = 20.0
JOINED_S = 300.0
COST_ROUNDS, COST_ASKS = 5, 6
COST_TOKENS = 3 * steps.BLOCK + 5


class Failed(Exception):
    """The campaign cannot go on: it has said why in the tally."""


def prepare(
    engines: Engines, witness: Follower, tally: Tally, say: Say, seed: int, ranks: int = 1, memory: str = "1GiB"
) -> Campaign:
    """Starts what a campaign needs, and has plain vLLM answer everything that will be asked."""
    write_weights(WEIGHTS)
    config = engine(ranks)
    load = Load(seed, TURNS, config.gpu_blocks, tally)
    probe = steps.agent("probe", PROBE_BLOCKS)
    server = engines.plain(plain(ranks))
    say(f"Plain vLLM answers the story of {TURNS} turns …")
    load.learn(server)
    expected = server.ask(Ask(probe.prompt, probe.max_tokens)).tokens
    # What engines of before have begun is over.
    witness.audit().bury()
    campaign = Campaign(engines.greenroom(config, memory, Mortal), load, witness, tally, say)
    campaign.first(probe, expected)
    return campaign


class Campaign:
    """Runs acts against one engine and its sidecar."""

    def __init__(self, rig: Rig, load: Load, witness: Follower, tally: Tally, say: Say) -> None:
        self.rig, self.load, self.witness, self.tally, self._say = rig, load, witness, tally, say
        self.hooks = HookTimes()
        self.acts = Acts(rig, tally, witness)
        self.ranks = len(workers(rig))
        self._floods = 0
        self._was_reset = False
        """Since vLLM's start: what it saves from then on is for nobody else, nor for the vLLM after it."""

    @property
    def sidecar(self) -> Mortal:
        return sidecar_of(self.rig)

    def first(self, probe: Ask, expected: list[int]) -> None:
        """Before the first round: the probe is in the arena."""
        self._probe, self._expected = probe, expected
        steps.wait_connected(self.sidecar, self.ranks)
        self._ask_probe("at first")
        steps.wait_saved(self.rig, "probe", PROBE_BLOCKS)

    # A round

    def round(self, act: Act) -> None:
        """Raises `Failed` if there is nothing to go on with."""
        began, before = time.monotonic(), len(self.tally.problems)
        acted = threading.Event()
        begun = len(self.witness.audit().spans)
        playing = threading.Thread(target=self._play, args=(acted,), daemon=True)
        playing.start()
        under_way = 0
        try:
            boot, heirless = self._boot(), act.ends_vllm and self._was_reset
            under_way = self._meet_copies(act, begun, playing)
            if act.ends_vllm:
                self.load.vllm_killed.set()
            fell_at = time.monotonic()
            self.acts.do(act)
            if act.ends_vllm:
                self._bury(act)
            else:
                if act.name in NEW_ARENA:
                    self.tally.without_sidecar.append((fell_at, time.monotonic()))
                self._find_again(act)
            acted.set()
            playing.join(JOINED_S)
            if playing.is_alive():
                self.tally.hung.append(f"{act.number} {act}: the load did not end within {JOINED_S:g} s")
                raise Failed
            if act.ends_vllm:
                self._restart_vllm()
                self._find_again(act)
            self._settle(act)
            self._check_probe(act, kept=self._boot() == boot and not heirless)
        except (ProcessFailed, rest.HttpError, OSError, AssertionError) as error:
            acted.set()
            self.tally.problems.append(f"round {act.number}, {act}: {error}")
            raise Failed from error
        finally:
            self.tally.acts[act.name] += 1
            self.tally.copies += under_way
            self.tally.mid_copy[act.name] += under_way > 0
        state = "; ".join(self.tally.problems[before:]) or "fine"
        self._say(f"  {act.number:>3} {act}: {under_way} copies under way, {time.monotonic() - began:.1f} s: {state}")

    def _play(self, acted: threading.Event) -> None:
        def going(played: int) -> bool:
            return played < WAVES or (not acted.is_set() and played < WAVES_MAX)

        try:
            self.load.play(self.rig, going)
        except Exception as error:
            self.tally.problems.append(f"the load broke off: {error!r}")

    def _meet_copies(self, act: Act, begun: int, playing: threading.Thread) -> int:
        """Waits for the moment; how many copies are under way then."""

        def now() -> bool:
            audit = self.witness.audit()
            return (len(audit.spans) >= begun + act.after_copies and audit.running() > 0) or not playing.is_alive()

        wait_until("copies", now, JOINED_S, poll_s=0.0005)
        return self.witness.audit().running()

    def _boot(self) -> str:
        return str(self.sidecar.get("/v1/status")["boot_id"])

    def _bury(self, act: Act) -> None:
        """A vLLM that lost a process ends by itself. What the sidecar makes of it."""
        process = self.rig.vllm.process
        assert process is not None
        try:
            wait_until("the end of vLLM", lambda: not process.members(), ENDED_S)
        except TimeoutError:
            self.tally.lingered += 1
        self.rig.vllm.kill()
        self.witness.audit().bury()
        wait_until("the engine's leave", lambda: not self.sidecar.get("/v1/status")["engines"], DRAINED_S)
        try:
            wait_until("no slot draining or leased", lambda: self.acts.slots("draining", "leased") == 0, DRAINED_S)
        except TimeoutError as error:
            self.tally.slots_left += self.acts.slots("draining", "leased")
            self.tally.problems.append(f"{act}: {error}")

    def _restart_vllm(self) -> None:
        self.rig.vllm.start()
        self._was_reset = False
        self.tally.vllm_starts += 1
        self.load.vllm_killed.clear()

    def _find_again(self, act: Act) -> None:
        start = time.monotonic()
        steps.wait_connected(self.sidecar, self.ranks)
        if act.name in NEW_ARENA or act.ends_vllm:
            self.tally.found_s.setdefault(act.name, []).append(time.monotonic() - start)

    def _settle(self, act: Act) -> None:
        """No slot drains any more, and every used one is explained by a save that has ended.

        Of the other side, saves that ended well and fill no slot, there is no bound to judge by: that is right for what
        was too late for its lease, reset or retired meanwhile, or whose engine died before it could say so, and the
        sidecar does not count these blocks. The summary does. Of blocks that were kept and are lost the probe tells.
        """
        wait_until("the end of copies", lambda: self.witness.audit().running() == 0, SETTLED_S)
        try:
            wait_until("the return of draining slots", lambda: self.acts.slots("draining") == 0, DRAINED_S)
        except TimeoutError as error:
            self.tally.slots_left += self.acts.slots("draining")
            self.tally.problems.append(f"{act}: {error}")
        boot, over = int(self._boot(), 16), 0

        def counts() -> tuple[int, int]:
            evicted = self.sidecar.metrics().sum("greenroom_evicted_blocks_total")
            return self.witness.audit().saved_by_boot[boot], int(evicted)

        def explained() -> bool:
            nonlocal over
            before, used = counts(), self.acts.slots("used")
            if counts() != before:
                return False
            saved, evicted = before
            over = self.tally.unexplained(boot, saved - evicted, used)
            return over == 0

        try:
            wait_until("an explanation of every used slot", explained, SETTLED_S)
        except TimeoutError:
            self.tally.slots_over = max(self.tally.slots_over, over)
            self.tally.problems.append(f"{act}: {over} slots are used and no save that ended filled them")

    # Hits

    def _ask_probe(self, what: str) -> Completion:
        answer = self.rig.vllm.ask(self._probe)
        if answer.tokens != self._expected:
            self.tally.difference.wrong.append(f"the probe {what}: {answer.tokens} instead of {self._expected}")
        return answer

    def _evict(self) -> None:
        self._floods += 1
        steps.evict(self.rig, f"evict-{self._floods}")

    def _hits(self, act: Act) -> bool:
        """Whether all of the probe comes back from the arena."""
        whole = PROBE_BLOCKS * steps.BLOCK
        for _ in range(PROBE_TRIES):
            self._evict()
            late, loaded = self._late(), self.rig.vllm.loaded()
            cached = self._ask_probe(f"after {act}").cached_tokens
            loaded = self.rig.vllm.loaded() - loaded
            if min(cached, loaded) >= whole:
                return True
            # Of one that was not found, all is computed. What of it was still on the GPU proves nothing.
            if cached <= loaded and self._late() == late:
                return False
        raise AssertionError(f"in {PROBE_TRIES} tries the probe was on the GPU still, or its lookup too late")

    def _late(self) -> float:
        """Lookups so far that were not answered in time."""
        return self.rig.vllm.metrics().sum("vllm:greenroom_timeouts_total")

    def _check_probe(self, act: Act, kept: bool) -> None:
        """`kept`: what was saved before can still be found."""
        if act.ends_vllm and act.reset:
            self._reset()
        if kept and not (act.ends_vllm and act.reset):
            hit = self._hits(act)
            self.tally.inherited += hit and act.ends_vllm
        else:
            self._evict()
            cached = self._ask_probe(f"after {act}").cached_tokens
            if cached:
                self.tally.problems.append(f"{act}: {cached} tokens of the probe were cached, and nobody may know them")
            steps.wait_saved(self.rig, "probe", PROBE_BLOCKS)
            hit = self._hits(act)
        self.tally.hits[act.name] += hit
        if not hit:
            self.tally.problems.append(f"{act}: the probe was not hit afterwards")

    def _reset(self) -> None:
        wait_until(
            "vLLM's consent to a reset", lambda: self.rig.vllm.reset_prefix_cache(reset_external=True), SETTLED_S
        )
        self._was_reset = True

    def run(self, acts: Iterable[Act]) -> None:
        """A round for each act, then what is measured and proved apart from them, which one rank is enough for."""
        for act in acts:
            self.round(act)
        if self.ranks == 1:
            self.measure_stopped()
            self.change_weights()
        self.last()

    # What is measured and proved apart from the rounds

    def measure_stopped(self) -> None:
        """New requests while the sidecar is stopped, among the same with one that answers.

        Of each the arena has the first block and the GPU nothing, or the sidecar would not be asked.
        """
        start = time.monotonic()

        def ask(fresh: Ask) -> float:
            return self.rig.vllm.ask(fresh).ttft_s * 1e3

        for number in range(COST_ROUNDS):
            names = [f"cost-{number}-{one}" for one in range(2 * COST_ASKS)]
            asks = [Ask(prompt(name, COST_TOKENS), 1, session=name) for name in names]
            for each in asks:
                steps.first_turn(self.rig, dataclasses.replace(each, prompt=each.prompt[: steps.BLOCK + 1]))
                # Nobody brings its block back ahead of it.
                self.sidecar.post(f"/v1/sessions/{each.session}/tool_start", {"tool": "AskUserQuestion"})
            steps.evict(self.rig, f"cost-{number}")
            self.tally.running_ms += map(ask, asks[:COST_ASKS])
            with stopped(self.sidecar.pid):
                self.tally.stopped_ms += map(ask, asks[COST_ASKS:])
            steps.wait_connected(self.sidecar, self.ranks)

        def written() -> bool:
            self._ask_probe("after the stops")
            self.tally.stopped_waits_ms = [wait for at, wait in self.hooks.read().waits if at >= start]
            return len(self.tally.stopped_waits_ms) >= len(self.tally.stopped_ms)

        wait_until("the engine's own figures of these requests", written, SETTLED_S)

    def change_weights(self) -> None:
        """vLLM is killed, other weights lie under the same path, and then the first ones again, by an update."""
        self.load.vllm_killed.set()
        self.rig.vllm.kill()
        self.witness.audit().bury()
        write_weights(OTHER_WEIGHTS)
        self._restart_vllm()
        steps.wait_connected(self.sidecar, self.ranks)
        answer = self.rig.vllm.ask(self._probe)
        if answer.tokens == self._expected:
            self.tally.problems.append(f"other weights under the same path answered like the first: {answer.tokens}")
        steps.wait_saved(self.rig, "probe", PROBE_BLOCKS)
        write_weights(WEIGHTS)
        rest.call("POST", self.rig.vllm.url + "/collective_rpc", {"method": "reload_weights"})
        self._reset()
        updated = self._ask_probe("after an update of the weights")
        self.tally.cached_of_other_weights = [answer.cached_tokens, updated.cached_tokens]

    def last(self) -> None:
        """All sessions are retired: nothing may be leased any more."""
        for one in self.sidecar.get("/v1/sessions")["sessions"]:
            raw("DELETE", f"{self.sidecar.url}/v1/sessions/{one['id']}")
        try:
            wait_until("the return of all leases", lambda: self.acts.slots("leased", "draining") == 0, DRAINED_S)
        except TimeoutError as error:
            self.tally.slots_left += self.acts.slots("leased", "draining")
            self.tally.problems.append(f"at the end: {error}")
        self.tally.problems += self.witness.audit().problems
