"""The demo: on real vLLM, an agent waits for a tool while other agents take the KV pool."""
