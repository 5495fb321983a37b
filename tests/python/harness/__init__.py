"""vLLM's real schedulers with the real connector and sidecar in front of a model whose KV bytes can be checked."""
