"""Which types and functions a file may ask for."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Collection, Iterable, Mapping
from types import ModuleType
from typing import Any

from torch_s3 import errors
from torch_s3.artifacts import data
from torch_s3.artifacts.stand_ins import Name
from torch_s3.wording import listed

_TESTS = {"tests", "testing", "_testing", "conftest"}  # modules of helpers that start processes and write files
_EXTRA = ("sklearn", "joblib")  # brings these packages
_LISTED = 20  # names in a message
_IDLE = 5  # of them that are trusted in vain
_ADVICE = (
    "Where you know who wrote it, name what you expect in trusted=[…]: types, modules of types, functions one by one"
)
_OF_TORCH = "of a torch.nn.Module, better have its state_dict() saved"
_OF_OTHERS = "or have it saved as .skops"
_MAKERS = ("newObj", "__pyx_unpickle_")  # Cython's, that make one object of the type that they are given


class Trust:
    """What is trusted: data, and what the caller names.

    A type or function that is named exactly is trusted, whatever it is. A module that is named stands for the types
    that are defined in it and below it: not its functions, of which some run what they are given; nothing that it has
    imported from elsewhere; and nothing of Python's own modules.

    Args:
        trusted: Dotted names of types, functions and modules; or these themselves.
        instead: What names stand for in place of what could be imported.
        advice: What the refusal says to do, in place of naming what is trusted.
    """

    def __init__(
        self,
        trusted: Iterable[str | type | ModuleType],
        instead: Mapping[str, Any] | None = None,
        *,
        advice: str | None = None,
    ) -> None:
        if trusted is True:  # type: ignore[comparison-overlap]  # as skops once took it
            raise TypeError("trusted= takes names of types or modules, such as ['sklearn']: nobody can trust all")
        is_one = isinstance(trusted, str | type | ModuleType) or not isinstance(trusted, Iterable)
        given: Any = [trusted] if is_one else trusted
        self._names = set(map(_named, given))
        self._instead = dict(instead or {})
        self._advice = advice

    def refusal(self, asked: Collection[str], names: Iterable[str], *, uri: str) -> errors.UnsafeArtifact:
        """An error that lists what is asked for and not trusted, and what was trusted in vain.

        Args:
            asked: For what it isn't.
            names: Of all that is asked for.
            uri: Of what asks.
        """
        used = {part for full in names for part in (full, *self._modules(full))}
        idle = [repr(name[:100]) for name in sorted(self._names - used)]
        vain = f" (of what is trusted, {listed(idle, _IDLE)} names none of it)" if idle else ""
        is_torchs = any(name.startswith("torch.") for name in asked)
        advice = self._advice or f"{_ADVICE}; {_OF_TORCH if is_torchs else _OF_OTHERS}"
        shown = listed([repr(name[:200]) for name in sorted(asked)], _LISTED)
        message = f"it asks for {shown}: not trusted, so nothing was built{vain}. {advice}"
        return errors.UnsafeArtifact(message, uri=uri, asks_for=sorted(asked))

    def covers(self, full: str) -> bool:
        """Whether a name is trusted, by itself or by a module's that is."""
        return self._is_named(full) or data.is_data(full) or self._by_module(full)

    def is_free(self, full: str) -> bool:
        """Whether it is trusted with any arguments."""
        return self._is_named(full) or (not data.is_data(full) and self._by_module(full))

    def _is_named(self, full: str) -> bool:
        return full in self._names or full in self._instead

    def _by_module(self, full: str) -> bool:
        return not self._names.isdisjoint(self._modules(full))

    @staticmethod
    def _modules(full: str) -> list[str]:
        """The names of modules that stand for a type."""
        parts = full.split(".")
        if parts[0] in sys.stdlib_module_names or _TESTS & set(parts):
            return []
        return [".".join(parts[:count]) for count in range(1, len(parts))]

    def resolved(self, names: Iterable[Name], *, uri: str) -> dict[tuple[str, str], Any]:
        """What names stand for. Modules are imported only when all names are trusted.

        Raises:
            UnsafeArtifact: Some are not trusted; the message lists them.
            ArtifactError: Something isn't there.
            ImportError: Nor is its package, which an extra brings.
        """
        names = list(names)
        self.check((name.full for name in names), uri=uri)
        found = {(name.module, name.name): self._found(name.full, uri=uri) for name in names}
        asked = {name.full for name in names if not self._is_as_trusted(name.full, found[name.module, name.name])}
        if asked:
            raise self.refusal(asked, (name.full for name in names), uri=uri)
        return found

    def check(self, names: Iterable[str], *, uri: str) -> None:
        """Judge by names alone.

        Raises:
            UnsafeArtifact: Some are not trusted; the message lists them.
        """
        names = set(names)
        asked = {full for full in names if not self.covers(full)}
        if asked:
            raise self.refusal(asked, names, uri=uri)

    def allows_type(self, full: str, *, uri: str) -> bool:
        """Whether the caller has named a type, or its module. It is imported in that case."""
        return full in self._names or (self._by_module(full) and self._is_as_trusted(full, self._found(full, uri=uri)))

    @property
    def names(self) -> list[str]:
        """What the caller named."""
        return sorted(self._names)

    def _found(self, full: str, *, uri: str) -> Any:
        if full in self._instead:
            return self._instead[full]
        parts = full.split(".")
        for count in range(len(parts) - 1, 0, -1):
            module = ".".join(parts[:count])
            try:
                found: Any = importlib.import_module(module)
                for part in parts[count:]:
                    found = getattr(found, part)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                    raise
            except (AttributeError, ValueError):  # there is none, or it can't be a name
                break
            else:
                return found
        if parts[0] in _EXTRA and sys.modules.get(parts[0]) is None:
            raise ImportError(f"{uri} asks for {full}: pip install 'torch-s3[sklearn]'")
        raise errors.ArtifactError(f"it asks for {full}, which isn't installed here, or not in its version", uri=uri)

    def _is_as_trusted(self, full: str, found: Any) -> bool:
        """Whether what was found is what the name was trusted for."""
        if self._is_named(full) or data.is_data(full):
            return True
        if not inspect.isclass(found) and not full.rpartition(".")[2].startswith(_MAKERS):
            return False
        home = f"{found.__module__}.{getattr(found, '__qualname__', full.rpartition('.')[2])}"
        return home in self._names or self._by_module(home)


def _named(trusted: Any) -> str:
    """The dotted name of what a caller trusts.

    Raises:
        TypeError: It has none.
    """
    if isinstance(trusted, str):
        return trusted
    if isinstance(trusted, ModuleType):
        return trusted.__name__
    if not hasattr(trusted, "__qualname__") or not hasattr(trusted, "__module__"):
        raise TypeError(f"trusted=[{trusted!r:.100}]: give its type, {_named(type(trusted))}, or a name")
    return f"{trusted.__module__}.{trusted.__qualname__}"
