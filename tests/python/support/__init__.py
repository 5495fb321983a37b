"""What the Python tests and the demo share: a model, servers, load."""
