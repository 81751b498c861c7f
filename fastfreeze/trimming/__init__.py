"""What is frozen runs without autograd, in eval mode and in its fastest form, on any model.

The model's own forward runs in each call (``trim``). While it does, frozen modules are in eval mode
and have stand-ins (``standins``) for what can be folded (``fold``, ``operations``): their values
are ``pending`` until something reads them.
"""

from fastfreeze.trimming.trimmed import TrimmedModel, trim

__all__ = ["TrimmedModel", "trim"]
