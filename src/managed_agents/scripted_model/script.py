"""Scripts: where they come from and what they are once loaded.

a Python file defines `reply(request)`; optionally `MAX_INPUT_TOKENS` a YAML file rules, see
`yaml_script.py` none `default_script.py`: an echo that understands a few commands
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from managed_agents.scripted_model.reply import ScriptError
from managed_agents.scripted_model.request import Request

ReplyFunction = Callable[[Request], object]


@dataclass(frozen=True, slots=True)
class Script:
    """A loaded script. `reply` runs on the server's event loop, so it must not block."""

    name: str
    reply: ReplyFunction
    max_input_tokens: int | None = None
    """Pretend that every model's context is this small."""


def load_script(path: Path | None) -> Script:
    """Load the script at `path`, or the built-in one. Raises: ScriptError that says why it cannot be used."""
    from managed_agents.scripted_model.default_script import reply
    from managed_agents.scripted_model.yaml_script import load_yaml

    if path is None:
        return Script("default", reply)
    if not path.is_file():
        raise ScriptError(f"{path}: no such file")
    if path.suffix == ".py":
        return _load_python(path)
    if path.suffix in (".yaml", ".yml"):
        function, max_input_tokens = load_yaml(path.read_text(), str(path))
        return Script(path.name, function, max_input_tokens)
    raise ScriptError(f"{path}: a script is a .py, .yaml or .yml file")


def _load_python(path: Path) -> Script:
    spec = importlib.util.spec_from_file_location(f"_managed_agents_script_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ScriptError(f"{path}: cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, "reply", None)
    if not callable(function):
        raise ScriptError(f"{path}: defines no function `reply(request)`")
    max_input_tokens = getattr(module, "MAX_INPUT_TOKENS", None)
    if max_input_tokens is not None and not isinstance(max_input_tokens, int):
        raise ScriptError(f"{path}: MAX_INPUT_TOKENS is not a number")
    return Script(path.name, function, max_input_tokens)
