"""vLLM's real schedulers with the real connector and sidecar in front of a model whose KV bytes can be checked."""

import os

# Read when vLLM is imported. The model runner that the harness plays is the first one.
os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
