"""Training methods by name."""

from collections.abc import Mapping
from typing import Any

from rayclip.methods.base import Method
from rayclip.names import Configurables

METHODS: Configurables[Method] = Configurables(
    "method",
    "methods",
    Method,
    option="--method",
    example="mmcoa:lambda_img=0.3",
)


def make_method(
    text: str, /, *, published: bool = False, defaults: Mapping[str, Any] | None = None, **settings: Any
) -> Method:
    """Return a method: `make_method("mmcoa:lambda_img=0.3", eps=1/255)`.

    Args:
        text: its name, and settings as text, which take precedence over all others.
        published: use the defaults of the published code (`Method.published`).
        defaults: settings for methods that have them, such as `substitutes`.
        settings: as values; None keeps the default.

    Raises:
        UserError: unknown method, a setting that it does not have, or one that it rejects.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    base = METHODS.find(text.partition(":")[0].strip()).published if published else {}
    return METHODS.make(text, defaults, **{**base, **given})
