"""The runner: the sandbox's main process. Python standard library only, Python 3.9 or later, nothing else
of ours.

It is mounted read-only into the sandbox and runs as uid 0 with no capabilities but SETUID, SETGID and KILL.
It executes tool calls as another uid, keeps their outcomes until they are acknowledged, and speaks frames
over a unix socket. Invariants: nothing runs twice under one tool use id; no epoch lower than the highest
seen is obeyed; uid 0 never opens a path that the model can name.
"""
