"""vLLM and Greenroom on a real GPU: what no CPU build and no stand-in driver shows. `conftest` says what it wants."""
