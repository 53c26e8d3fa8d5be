"""Write release notes: `python -m examples.release_notes [REPOSITORY] [RANGE]`, for instance `. v1.3.0..HEAD`.

Without a range: everything since the newest tag, or everything.
"""

import subprocess
import sys
from pathlib import Path

from examples.launch import work

FOLDER = Path(__file__).parent
COMMITS_MAX = "500"


def git(repository: str, *arguments: str) -> str:
    """What git answers; an error ends the program with git's own words."""
    done = subprocess.run(["git", "-C", repository, *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.stderr)
    return done.stdout


def since_last_tag(repository: str) -> str:
    tag = git(repository, "tag", "--sort=-creatordate", "--merged", "HEAD").split()
    return f"{tag[0]}..HEAD" if tag else "HEAD"


def main() -> None:
    repository = sys.argv[1] if len(sys.argv) > 1 else "."
    commits = sys.argv[2] if len(sys.argv) > 2 else since_last_tag(repository)
    layout = "--format=commit %h %as %an%n%B"
    log = git(repository, "log", "--no-merges", "--name-only", f"--max-count={COMMITS_MAX}", layout, commits)
    if not log.strip():
        sys.exit(f"no commits in {commits}")
    made = work(FOLDER, f"Write the release notes for {commits}.", {"/commits.txt": log.encode()})
    print(made["NOTES.md"])


if __name__ == "__main__":
    main()
