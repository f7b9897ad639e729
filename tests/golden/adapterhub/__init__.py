"""Adapters and answers of the `adapters` library, and the mathematics that gives the same answers."""
