"""Measurements on real vLLM servers: how soon a hint becomes a copy, and what Greenroom costs where it cannot help."""
