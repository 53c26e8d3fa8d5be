"""The session log: append-only events in Postgres, the truth of every session."""
