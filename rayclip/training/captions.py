"""Read the captions that a method trains on when a run is planned, so that no worker needs the table's file."""

from collections.abc import Sequence
from dataclasses import replace

from rayclip.data.captions import BUNDLED, read_captions, table_for
from rayclip.methods import Method
from rayclip.methods.saft import SAFT, TEMPLATES
from rayclip.types import UserError


def with_captions(method: Method, data: str, class_names: Sequence[str]) -> Method:
    """Return the method with its table of captions read in; bundled data default to the bundled captions.

    Args:
        data: data specification, as on the command line.

    Raises:
        UserError: SAFT has no captions, or too few for a class, or a table that does not fit the classes.
    """
    if not isinstance(method, SAFT) or method.texts or method.captions == TEMPLATES:
        return method
    name = data.partition("#")[0]  # `digits#holdout` has the classes of `digits`
    captions = method.captions or (name if name in BUNDLED else "")
    if not captions:
        raise UserError(
            "saft trains on captions of the classes: name a table as rayclip captions filter writes it, "
            "--method saft:captions=FILE, or do without, saft:captions=templates."
        )
    captions = table_for(captions, data)
    return replace(method, captions=captions).with_texts(read_captions(captions, class_names), class_names)
