"""Greenroom's connector for vLLM. ``"kv_connector_module_path": "greenroom.vllm"`` leads here.

``connector`` is the class vLLM drives; ``scheduler`` and ``worker`` are its two roles; ``compat`` is the only file
that knows vLLM's insides. Nothing is imported until vLLM asks for the connector.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from greenroom.vllm.connector import GreenroomConnector

__all__ = ["GreenroomConnector"]


def __getattr__(name: str) -> Any:
    if name == "GreenroomConnector":
        from greenroom.vllm.connector import GreenroomConnector

        return GreenroomConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
