"""Bytes of files, snapshots and skills, addressed by their content."""
