"""vLLM's plugin entry point. vLLM calls it in each of its processes, whether Greenroom is used or not."""

from __future__ import annotations

NAME = "GreenroomConnector"


def register() -> None:
    """Makes ``"kv_connector": "GreenroomConnector"`` work without a module path. May be called again."""
    # Imported here, not at the top: vLLM loads plugins early, and this file must cost nothing until then.
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    try:
        KVConnectorFactory.register_connector(NAME, "greenroom.vllm.connector", NAME)
    except ValueError:
        # vLLM's word for "already registered", by an earlier call in this process.
        return
