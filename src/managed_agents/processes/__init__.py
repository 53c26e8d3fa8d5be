"""Composition roots: each process builds its parts once and hands them down as constructor arguments."""
