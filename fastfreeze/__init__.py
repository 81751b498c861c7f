"""Train faster by freezing, and get an ensemble for free."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastfreeze._public import *  # noqa: F403
else:  # torch takes seconds to import, and ``fastfreeze --help`` does without

    def __getattr__(name: str) -> Any:
        """Import the public names; Python asks here for what is not a global of this module yet."""
        public = import_module("fastfreeze._public")
        globals().update({n: getattr(public, n) for n in ("__all__", *public.__all__)})
        try:
            return globals()[name]
        except KeyError:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
