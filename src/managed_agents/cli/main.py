"""The `managed-agents` command. Subcommands are imported when they are used: `--help` must not wait for the server's libraries."""

import importlib

import click

# Name of the command, its module below this package, one line of help.
COMMANDS = {
    "up": ("serve", "Everything on this machine: Postgres, API, worker. Ctrl-C stops it."),
    "demo": ("demo", "Watch an agent audit a project's dependencies, end to end."),
    "api": ("serve", "One API process."),
    "worker": ("serve", "One worker process."),
    "migrate": ("serve", "Bring the database to this version."),
    "scripted-model": ("serve", "The scripted model alone: a Messages API that follows a script."),
    "keys": ("admin", "Create, list and revoke API keys."),
    "workspaces": ("admin", "Create and list workspaces."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"managed_agents.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, cmd_name.replace("-", "_"))
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


EPILOG = """
\b
Examples:
  managed-agents up
  managed-agents up --port 9000 --data-dir ./state
  ANTHROPIC_API_KEY=sk-… managed-agents demo
  managed-agents keys create --name ci

Every flag of a command is also an environment variable: --data-dir is MANAGED_AGENTS_DATA_DIR. A flag wins.
"""


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="managed-agents")
def main() -> None:
    """An open, self-hosted server for the Claude Managed Agents API."""


if __name__ == "__main__":
    main()
