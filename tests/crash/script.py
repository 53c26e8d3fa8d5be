"""What the model does in crash tests. Commands count their runs in a file, so that the log itself tells of a second one."""

from collections.abc import Callable

from managed_agents.scripted_model import Reply, Request, stall, text, tool_use

SIDE = "side"  # one line for each run of the command
GO = "go"  # lets a gated command end
ENDED = "ended"  # written by a gated command at its end
NOTES = "notes"
REPORT = "report.md"
FOREVER_SECONDS = 600.0
RUN = f"echo ran >> /workspace/{SIDE}; echo a report > /mnt/session/outputs/{REPORT}; echo finished"
GATED = (
    f"echo ran >> /workspace/{SIDE}; until [ -e /workspace/{GO} ]; do sleep 0.02; done; touch /workspace/{ENDED}; echo finished"
)

Script = Callable[[Request], Reply]


def working(command: str) -> Script:
    """Two calls side by side, one call that counts the runs of `command`, and a last word."""

    def reply(request: Request) -> Reply:
        match request.round:
            case 0:
                write = tool_use("write", file_path=f"/workspace/{NOTES}", content="a note\n")
                return [text("On it."), tool_use("bash", command=command), write]
            case 1:
                return [tool_use("bash", command=f"wc -l < /workspace/{SIDE}; cat /workspace/{NOTES}")]
            case _:
                return "All done."

    return reply


work = working(RUN)
gated_work = working(GATED)


def stalling_once(reply: Script, *, in_round: int = 0, seconds: float = FOREVER_SECONDS) -> Script:
    """`reply`, but the first time the round is asked for, the model falls silent in the midst of its answer."""

    def stalled(request: Request) -> Reply:
        if request.round == in_round and request.attempt == 1:
            return [text("Let me th"), stall(seconds), text("ink about it.")]
        return reply(request)

    return stalled
