"""Whether ``map_location`` can be, before anything is read."""

from __future__ import annotations

from typing import Any

import torch

_NOTHING = torch.UntypedStorage(0)  # type: ignore[no-untyped-call]
_restore: Any = torch.serialization.default_restore_location  # it has no types


def check_map_location(given: Any, *, uri: str, one: bool) -> None:
    """Refuse what names no device of this machine.

    Args:
        given: As :func:`torch.load` takes it.
        uri: For errors.
        one: It is one device, as :func:`torch.jit.load` takes it, and no dict or function.

    Raises:
        TypeError: It is of another kind.
        ValueError: There is no such device.
    """
    if given is None or (callable(given) and not one):
        return
    for place in given.values() if isinstance(given, dict) and not one else [given]:
        if not isinstance(place, str | torch.device) and (one or not isinstance(place, bytes)):
            raise TypeError(f"{uri}: map_location={place!r:.100} is no device: give one such as 'cpu' or 'cuda:0'")
        try:
            _restore(_NOTHING, place.decode("ascii") if isinstance(place, bytes) else str(place))
        except RuntimeError as error:
            reason = str(error).partition(". ")[0][:200]
            raise ValueError(f"{uri}: map_location={str(place)!r:.100} is no device here ({reason})") from None
