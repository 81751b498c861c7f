"""A model as a graph of its operations: what ensembles share, stack and fold."""
