"""Flags mirror settings: `--data-dir` is `MANAGED_AGENTS_DATA_DIR`, and a flag wins over the environment.

Flags are written into the environment before the settings are read, so that there is one way of parsing them and child
processes see the same.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, get_args

import click
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from managed_agents.core.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])
PREFIX = "MANAGED_AGENTS_"
CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


def variable(setting: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + setting.upper()


def setting_flags(names: Sequence[str]) -> Callable[[Command], Command]:
    """Give a command one flag per named setting."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = _flag(name, Settings.model_fields[name])(command)
        return command

    return decorate


def _flag(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    flag = "--" + name.replace("_", "-")
    text = f"{field.description} [{variable(name)}]"
    if field.annotation is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    metavar = "TEXT"
    kinds = {field.annotation, *get_args(field.annotation)}
    if int in kinds or float in kinds:
        metavar = "NUMBER"
    if SecretStr in kinds:
        text += " Better given by the environment: others see the arguments of a process."
    return click.option(flag, name, default=None, metavar=metavar, help=text)


def read_settings(flags: dict[str, Any]) -> Settings:
    """Write the given flags into the environment and read all settings.

    Raises:
        click.UsageError: one is not acceptable; the message names its flag and its variable.
    """
    for name, value in flags.items():
        if value is not None:
            os.environ[variable(name)] = str(value).lower() if isinstance(value, bool) else str(value)
    for name in Settings.model_fields:
        if os.environ.get(variable(name)) == "":
            del os.environ[variable(name)]  # set to nothing is not set
    try:
        return Settings()  # pyright: ignore[reportCallIssue]  # every value comes from the environment
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        name = str(first["loc"][0])
        flag = "--" + name.replace("_", "-")
        raise click.UsageError(f"{flag} ({variable(name)}): {first['msg']}") from None
