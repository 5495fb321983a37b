"""Tests on real vLLM servers, over HTTP. Not called `vllm`: that would hide the package of that name."""
