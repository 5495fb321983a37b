"""Real servers under random deaths, stops and shortages: `make faults` and `make soak`. See `__main__`."""
