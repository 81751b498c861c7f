"""Where users already are: callbacks and logging for other packages, none of which is required.

Each module needs the package that it is named after: ``lightning``, ``transformers``; what is
in ``tensorboard`` writes to a writer that the user has made.
"""
