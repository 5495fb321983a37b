"""How large things are on a GPU, and on the CPU build, where the same tests are tried before a GPU is lent."""

from __future__ import annotations

import dataclasses
import os

from support.make_model import DEMO
from support.paths import CUDA
from support.servers import Cuda, VllmConfig

ON_CPU = "GREENROOM_GPU_TESTS_ON_CPU"
"""Set: GPU_PYTHON has vLLM's CPU build. Nothing is learned of a GPU; mistakes in these tests show."""

MODEL = "GREENROOM_GPU_TESTS_MODEL"
"""Another model, for what things cost: with `llama-8b` a token takes as long as with users' models. Its weights are
made up and its answers do not depend on what it was asked: `test_costs` is all that it is good for."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One machine's."""

    config: VllmConfig
    memory: str
    """Of the arena: it must keep all that these tests want to find again."""
    agent_tokens: int
    agents: int
    answer_tokens: int
    flood_answer_tokens: int
    """So many that those who take the pool hold it at the same time, although their loads come one after the other."""
    group_sessions: int
    """Two such groups push each other out of the pool; see `swaps`."""
    group_tokens: int
    """Of each of the sessions."""
    streams: int
    stream_tokens: int
    """Prompt of each stream."""
    stream_growth: int
    """Blocks that each stream may come to need besides; two groups must not fit into the pool all the same."""
    near_tie: float
    """Two best log probabilities that are closer than this may change places by the noise of other kernels."""
    period_s: float
    traffic_min: float
    """Bytes per second without which a period was none with traffic."""

    def blocks_of(self, tokens: int) -> int:
        """Full blocks."""
        return tokens // self.config.block_size

    def pool(self) -> int:
        """Blocks for one group and the streams, so that the other group has no room beside it."""
        streams = self.streams * (self.blocks_of(self.stream_tokens) + self.stream_growth)
        return self.group_sessions * (self.blocks_of(self.group_tokens) + 1) + streams


CPU = Sizes(
    config=VllmConfig(version=CUDA, model=DEMO, max_model_len=3072),
    memory="256MiB",
    agent_tokens=1000,
    agents=2,
    answer_tokens=8,
    flood_answer_tokens=64,
    group_sessions=2,
    group_tokens=1500,
    streams=2,
    stream_tokens=100,
    stream_growth=8,
    near_tie=0.25,
    period_s=1.0,
    traffic_min=1e3,
)

GPU = Sizes(
    config=VllmConfig(version=CUDA, model="gpu", block_size=16, max_model_len=32768, cuda=Cuda(memory_share=0.3)),
    memory="20GiB",
    agent_tokens=6000,
    agents=4,
    answer_tokens=64,
    flood_answer_tokens=256,
    group_sessions=4,
    group_tokens=12_000,
    streams=4,
    stream_tokens=500,
    stream_growth=128,
    near_tie=0.25,
    period_s=2.0,
    traffic_min=2e9,
)


def here() -> Sizes:
    """This machine's, with the pool that goes with them."""
    sizes = CPU if os.environ.get(ON_CPU) else GPU
    model = os.environ.get(MODEL) or sizes.config.model
    return dataclasses.replace(sizes, config=dataclasses.replace(sizes.config, model=model, gpu_blocks=sizes.pool()))
