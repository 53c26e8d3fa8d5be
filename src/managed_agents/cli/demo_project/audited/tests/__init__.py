"""Tests of readability."""
