"""Reproductions of the two papers: models, data and the training run behind the command line."""
