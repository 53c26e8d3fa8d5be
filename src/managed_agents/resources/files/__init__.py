"""Files: uploads, copies mounted into sessions, and what sessions produced."""
