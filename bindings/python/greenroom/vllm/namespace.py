"""What keeps the KV of different models apart: all that decides a block's bytes besides the block hash.

The hash is vLLM's own and covers tokens, salt, LoRA name and multimodal inputs. It does not cover the weights, or how
their KV is laid out; that is here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from typing import Any

from greenroom.vllm import compat

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json")

_log = logging.getLogger("vllm.greenroom")


def material(config: Any, kv_cache_config: Any, layout: str, weights: list[Any]) -> bytes:
    """Everything besides the block hash that decides the bytes of a block, as canonical JSON.

    Call it with the first request: the hash seed is only known then. `weights`: as they were at the start, since the
    files may have been replaced. Equal bytes mean that KV may be shared.
    """
    model, cache = config.model_config, config.cache_config
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    material = {
        "vllm": compat.VERSION,
        "device": compat.device_type(),
        "weights": weights,
        "load_format": str(config.load_config.load_format),
        "model_config": _model_details(model),
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "kv_dtype": str(cache.cache_dtype),
        "kv_scales": bool(getattr(cache, "calculate_kv_scales", False)),
        "kv_spec": repr(spec),
        "layers": list(kv_cache_config.kv_cache_groups[0].layer_names),
        "layout": layout,
        "tensor_parallel": config.parallel_config.tensor_parallel_size,
        "hash": [str(cache.prefix_caching_hash_algo), compat.hash_seed()],
        "speculative": _speculative(config.speculative_config),
        # A block hash names a LoRA adapter, not its files: KV of such an engine is its own.
        "lora": uuid.uuid4().hex if config.lora_config is not None else None,
    }
    if compat.hash_seed_is_random():
        _log.warning(
            "Greenroom: this vLLM draws its hash seed by chance, so saved KV does not outlive the engine: "
            "set PYTHONHASHSEED to keep it"
        )
    return json.dumps(material, sort_keys=True, separators=(",", ":"), default=str).encode()


def _model_details(model: Any) -> str:
    """Digest of the model's own configuration: sizes, rope, overrides."""
    parts = [model.hf_config.to_json_string(use_diff=False), repr(model.hf_overrides), str(model.max_model_len)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def weights(config: Any) -> list[Any]:
    """What names the weights: the revision that was resolved, or the files' names, sizes and times of change.

    The kernel's own times: those of modification a copy may set. Call it as soon as the weights are loaded.
    """
    model = config.model_config
    path = model.model
    if not os.path.isdir(path):
        return [path, model.revision, getattr(model.hf_config, "_commit_hash", None)]
    files = []
    for entry in sorted(os.scandir(path), key=lambda one: one.name):
        if entry.name.endswith(_WEIGHT_SUFFIXES):
            info = entry.stat()
            files.append([entry.name, info.st_size, info.st_ctime_ns])
    return [os.path.realpath(path), model.revision, files]


def _speculative(speculative: Any) -> list[str] | None:
    if speculative is None:
        return None
    names = ("method", "model", "revision", "quantization", "num_speculative_tokens")
    return [str(getattr(speculative, name, None)) for name in names]
