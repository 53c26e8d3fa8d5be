"""Review a project: `python -m examples.code_reviewer [DIRECTORY]`. Ends with status 1 when changes are requested."""

import io
import subprocess
import sys
import tarfile
from pathlib import Path

from examples.launch import work

FOLDER = Path(__file__).parent


def pack(project: Path) -> bytes:
    """The project's files as git knows them (so nothing ignored), or all that are not hidden."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listing = subprocess.run(command, cwd=project, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        names = listing.stdout.splitlines()
    else:
        paths = [path.relative_to(project) for path in sorted(project.rglob("*"))]
        names = [str(path) for path in paths if not any(part.startswith(".") for part in path.parts)]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name in names:
            if (project / name).is_file():
                archive.add(project / name, name)
    return packed.getvalue()


def main() -> int:
    project = Path(sys.argv[1] if len(sys.argv) > 1 else ".").resolve()
    made = work(FOLDER, f"Review the project {project.name}.", {"/project.tar.gz": pack(project)})
    review = made["review.md"]
    print(review)
    return int(not review.startswith("Verdict: approve"))


if __name__ == "__main__":
    sys.exit(main())
