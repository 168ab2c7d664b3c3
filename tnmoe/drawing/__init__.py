"""Operators drawn as text and for notebooks, with nothing but strings."""
