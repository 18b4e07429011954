"""A bounded memory for functions whose values never change, such as a text's tokens."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Remembered(Generic[K, V]):
    """A function of several keys at once that computes only those which it does not remember.

    Args:
        compute: returns the values of distinct keys, in their order.
        most: values to keep; the memory starts anew when it would hold more.
    """

    def __init__(self, compute: Callable[[Sequence[K]], Iterable[V]], most: int) -> None:
        self._compute, self._most = compute, most
        self._known: dict[K, V] = {}

    def __call__(self, keys: Sequence[K]) -> list[V]:
        known, distinct = self._known, dict.fromkeys(keys)
        missing = [key for key in distinct if key not in known]
        if missing:
            if len(known) + len(missing) > self._most:
                known, missing = {}, list(distinct)
            known.update(zip(missing, self._compute(missing), strict=True))
            self._known = known if len(known) <= self._most else {}
        return [known[key] for key in keys]
