"""What of the shell outlives its process: directory, variables, functions, aliases, options.

The shell itself writes it to a file in the commands' home, between two commands; the first shell after a start of the sandbox
reads it. So it travels with the files, through a stop as through a snapshot. Variables that still are as the sandbox set them
are left out: the next sandbox sets its own. Lost are traps, jobs and open descriptors.
"""

from __future__ import annotations

import shlex

from .config import Config

STATE_BYTES_MAX = 1024 * 1024
# The shell's own, or ours; not to be set from outside.
_SKIPPED = (
    "BASH*|__*|DIRSTACK|EPOCH*|EUID|FUNCNAME|GROUPS|HISTCMD|HOSTNAME|HOSTTYPE|LINENO|MACHTYPE|OLDPWD|OPTERR|OPTIND|OSTYPE"
    "|PIPESTATUS|PPID|PWD|RANDOM|SECONDS|SHELL|SHELLOPTS|SHLVL|SRANDOM|UID|_"
)


def path(config: Config) -> str:
    """Where the state is kept, in the home of the commands."""
    return f"{config.environment.get('HOME', '/tmp')}/.local/state/managed-agents/shell"


def saving(config: Config) -> str:
    """Shell text that writes the state, whole or not at all."""
    unchanged = "".join(
        f"{name}) [[ ${{{name}-}} == {shlex.quote(value)} ]] && continue;;"
        for name, value in sorted(config.environment.items())
        if name.isidentifier()
    )
    target = path(config)
    file, directory = shlex.quote(target), shlex.quote(target.rpartition("/")[0])
    # Another sandbox of the session may have them elsewhere.
    workspace, home = shlex.quote(config.workspace), shlex.quote(config.environment.get("HOME", "/tmp"))
    return f"""__options=$(builtin set +o; builtin shopt -p)
{{ command mkdir -p {directory} && {{
  for __name in $(builtin compgen -v); do
    case $__name in {_SKIPPED}) continue;; {unchanged} esac
    builtin declare -p -- "$__name"
  done
  builtin declare -f; builtin alias -p
  case $PWD in
    {workspace}|{workspace}/*) builtin printf 'cd -- %q\\n' ".${{PWD#{workspace}}}";;
    {home}|{home}/*) builtin printf 'cd -- ~/%q\\n' ".${{PWD#{home}}}";;
    *) builtin printf 'cd -- %q\\n' "$PWD";;
  esac
  builtin printf '%s\\n' "$__options"
}} > {file}.part && [[ $(command wc -c < {file}.part) -le {STATE_BYTES_MAX} ]] && command mv -f {file}.part {file}; }} 2>/dev/null
builtin unset __options __name"""


def forgetting(config: Config) -> str:
    """Shell text that empties the state, without a process: there may be none left."""
    file = shlex.quote(path(config))
    return f"[[ -s {file} ]] && : > {file}"


def loading(config: Config) -> str:
    """Shell text that takes the state up, when there is one."""
    file = shlex.quote(path(config))
    return f"[[ -r {file} ]] && builtin . {file} >/dev/null 2>&1"
