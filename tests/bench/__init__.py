"""`make bench`: every speed claim of the project, each beside a raw baseline of the same run."""
