"""Names of models."""

import re

_DATE = re.compile(r"-\d{8}$")


def alias(model: str) -> str:
    """Return the name without the date of a snapshot, whose rules and prices are those of the model."""
    return _DATE.sub("", model)
