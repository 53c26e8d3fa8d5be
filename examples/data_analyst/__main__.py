"""Ask a question about a CSV file: `python -m examples.data_analyst [FILE.csv] [QUESTION]`.

The report, and the program that computes it, are also saved in the current directory.
"""

import sys
from pathlib import Path

from examples.launch import work

FOLDER = Path(__file__).parent
QUESTION = "Which region earns more, and how does that change over time?"


def main() -> None:
    table = Path(sys.argv[1] if len(sys.argv) > 1 else FOLDER / "sales.csv")
    question = sys.argv[2] if len(sys.argv) > 2 else QUESTION
    made = work(FOLDER, question, {"/data.csv": table.read_bytes()})
    for name, content in made.items():
        place = Path.cwd() / f"{table.stem}-{name}"
        place.write_text(content)
        print(f"wrote {place}", file=sys.stderr)
    print(made["report.md"])


if __name__ == "__main__":
    main()
