"""The `managed-agents` command. Subcommands are imported on use: `--help` must not wait for the server's libraries."""

import importlib

import click

from managed_agents.processes import parent

# Name of the command, where it is defined, one line of help.
COMMANDS = {
    "up": ("managed_agents.cli.serve:up", "Everything on this machine: Postgres, API, worker. Ctrl-C stops it."),
    "demo": ("managed_agents.cli.demo:demo", "Watch an agent audit a project's dependencies, end to end."),
    "api": ("managed_agents.cli.serve:api", "One API process."),
    "worker": ("managed_agents.cli.serve:worker", "One worker process."),
    "egress": ("managed_agents.cli.serve:egress", "The network of this host's sandboxes, apart from its workers."),
    "migrate": ("managed_agents.cli.serve:migrate", "Bring the database to this version."),
    "keys": ("managed_agents.cli.admin:keys", "Create, list, switch off and revoke API keys."),
    "environment-keys": ("managed_agents.cli.admin:environment_keys", "The keys with which workers serve an environment."),
    "workspaces": ("managed_agents.cli.admin:workspaces", "Create, list and archive workspaces; their rate limits."),
    "egress-log": ("managed_agents.cli.admin:egress_log", "What the sandboxes of a session asked the network for."),
    "scripted-model": (
        "managed_agents.scripted_model.server:scripted_model_command",
        "The scripted model alone: a Messages API that follows a script.",
    ),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command = getattr(importlib.import_module(module), attribute)
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
@click.pass_context
def main(ctx: click.Context) -> None:
    """An open, self-hosted server for the Claude Managed Agents API."""
    if ctx.invoked_subcommand != "up":  # it becomes another program, which does so itself
        parent.watch()


if __name__ == "__main__":
    main()
