"""Find attacks, methods, defences, scorers and data sets by name: the package's own, and those of other packages.

The package's own are in the list that a registry is made of, or are added with its decorator `register`. Another
package offers its own through an entry point in the registry's group, such as `rayclip.attacks`.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from rayclip.settings import Configurable, convert_all, split_names, split_one, suggest
from rayclip.types import UserError

T = TypeVar("T")
C = TypeVar("C", bound=Configurable)


class Registry(Mapping[str, T]):
    """Everything of one kind by its `name`: the package's own first, then what other packages offer, loaded when asked
    for."""

    def __init__(self, kind: str, group: str, base: type, own: Iterable[T] = ()) -> None:
        """
        Args:
            kind: for messages, such as `attack`.
            group: the entry points' group is `rayclip.<group>`.
            base: class of everything in the registry, or, of a registry of classes, their base class.
        """
        self.kind, self.group, self._base = kind, f"rayclip.{group}", base
        self._own: dict[str, T] = {}
        for one in own:
            self.register(one)

    def register(self, one: T) -> T:
        """Add one and return it, so that this can decorate a class.

        Raises:
            UserError: the name is taken.
        """
        name = one.name  # type: ignore[attr-defined]
        if name in self._own:
            raise UserError(f"there is {article(self.kind)} named '{name}' already: give yours another name.")
        self._own[name] = one
        return one

    def __getitem__(self, name: str) -> T:
        """Return the one with this name.

        Raises:
            KeyError: there is none; `find` explains.
            UserError: the name has two meanings, or what another package offers under it cannot be used.
        """
        points = [point for point in offered(self.group) if point.name == name]
        refuse_collisions(self.kind, self._own, points)
        if name in self._own:
            return self._own[name]
        if not points:
            raise KeyError(name)
        return self._load(points[0])

    def __iter__(self) -> Iterator[str]:
        return iter(known_names(self.kind, self.group, self._own))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def find(self, name: str) -> T:
        """Return the one with this name.

        Raises:
            UserError: there is none; the message suggests a similar name. Also as `__getitem__`.
        """
        try:
            return self[name]
        except KeyError:
            raise unknown(self.kind, name, self) from None

    def _load(self, point: EntryPoint) -> T:
        offers = f"the entry point '{point.name}' in {self.group} of the package {_package(point)}"
        try:
            one: Any = point.load()
        except Exception as error:
            raise UserError(
                f"{offers} cannot be loaded ({type(error).__name__}: {error}): mend or remove it."
            ) from error
        fits = issubclass(one, self._base) if isinstance(one, type) else isinstance(one, self._base)
        if not fits:
            raise UserError(f"{offers} is no {self.kind}: it has to be {article(self._base.__name__)}.")
        if getattr(one, "name", None) != point.name:
            raise UserError(f"{offers} is named '{getattr(one, 'name', '')}' itself: give both the same name.")
        return one


class Configurables(Registry[type[C]], Generic[C]):
    """A registry of classes with settings, which users write as `pgd:steps=100,step=1/255`."""

    def __init__(
        self,
        kind: str,
        group: str,
        base: type,
        own: Iterable[type[C]] = (),
        *,
        option: str,
        example: str,
        about: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            option, example: for messages: the option of the command line that takes these, and a value of it.
            about: a line on each of the package's own; of the others, it is their docstring's first.
        """
        super().__init__(kind, group, base, own)
        self.option, self.example, self._about = option, example, about or {}

    def about(self, name: str) -> str:
        """Return one line that describes a class."""
        return self._about.get(name) or (self[name].__doc__ or "").strip().split("\n")[0]

    def make(self, text: str, defaults: Mapping[str, Any] | None = None, **settings: Any) -> C:
        """Return one with its settings: `make("pgd:steps=100", step=1/255)`.

        Args:
            text: a name, and settings as text, which take precedence over all others.
            defaults: settings for those that have them.
            settings: as values.

        Raises:
            UserError: unknown name or setting, or an invalid value.
        """
        name, written = split_one(text, self.option, self.example)
        return self._configure(name, written, {**self._known(name, defaults or {}), **settings})

    def parse(self, text: str, defaults: Mapping[str, Any] | None = None) -> list[C]:
        """Return those that `text` names with their settings, in that order: `pgd:steps=100,step=1/255,bert`.

        Raises:
            UserError: unknown name or setting, an invalid value, or one named twice with the same settings.
        """
        found = [
            self._configure(name, written, self._known(name, defaults or {}))
            for name, written in split_names(text, self.option, self.example)
        ]
        if len(set(found)) < len(found):
            twice = f"names {article(self.kind)} twice with the same settings"
            raise UserError(f"{self.option} '{text}' {twice}: drop one.")
        return found

    def _configure(self, name: str, written: Mapping[str, str], settings: Mapping[str, Any]) -> C:
        """Return one with `settings` as values, and with those in `written` as text, which take precedence."""
        kind = self.find(name)
        values = convert_all(kind.noun, name, written, kind.settings(), kind.default_norm())
        return kind.with_settings({**settings, **values})

    def _known(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        types = self.find(name).settings()
        return {key: value for key, value in settings.items() if key in types}


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown name."""
    names = list(known)
    use = "use none or one of" if kind == "defence" else "use one of"
    return UserError(f"unknown {kind} '{name}': {suggest(name, names)}{use} {', '.join(names)}.")


def known_names(kind: str, group: str, own: Iterable[str]) -> list[str]:
    """Return the package's `own` names and those that others offer; raise a `UserError` if two things have one name."""
    points = offered(group)
    refuse_collisions(kind, own, points)
    return [*own, *sorted(point.name for point in points)]


def refuse_collisions(kind: str, own: Iterable[str], points: Iterable[EntryPoint]) -> None:
    """Raise a `UserError` if two things have one name."""
    seen = dict.fromkeys(own, "rayclip")
    for point in points:
        if point.name in seen:
            raise UserError(
                f"two packages offer {article(kind)} named '{point.name}', {seen[point.name]} and {_package(point)}: "
                f"remove one of them, or rename the entry point of {_package(point)} in {point.group}."
            )
        seen[point.name] = _package(point)


def offered(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points in a group; a package that lies on the path twice counts once."""
    return _offered(group, tuple(sys.path))


@cache
def _offered(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(dict.fromkeys(entry_points(group=group)))


def article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]
