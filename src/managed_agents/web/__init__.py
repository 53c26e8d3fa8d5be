"""The HTTP edge: identity, request checks, error envelope, strict bodies and queries, pagination.

Nothing here knows a resource. `resources/` and `api/` are built on it.
"""
