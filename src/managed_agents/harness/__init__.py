"""The brain: reads a session's log, decides, calls the model or a tool, appends."""
