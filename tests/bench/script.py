"""The model of the benches: it answers at once."""

from managed_agents.scripted_model import Part, Request, text


def reply(_request: Request) -> list[Part]:
    return [text("ok")]
