"""Set-up, embedded Postgres, command line, supervisor, demo."""
