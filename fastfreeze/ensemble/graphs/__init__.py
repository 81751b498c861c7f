"""A model as a graph of its operations: traced, run to see what it does, and folded."""
