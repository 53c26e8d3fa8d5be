"""Sessions: create, read, update, archive, delete; their events, threads and resources."""
