"""Postgres: engine, transactions, notifications, column types."""
