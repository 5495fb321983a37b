"""The two servers that the tests of this folder share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from gpu.sizes import Sizes
from support.servers import Rig, VllmServer

Record = Callable[..., None]
"""Adds figures to the results."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Plain vLLM and vLLM with Greenroom, on one device. They differ in Greenroom only."""

    plain: VllmServer
    rig: Rig
    sizes: Sizes

    def log_tails(self) -> str:
        children = (self.plain.process, self.rig.vllm.process, self.rig.sidecar.process)
        return "\n".join(child.log_tail() for child in children if child is not None)
