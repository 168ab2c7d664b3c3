"""Truncation: what may be cut, how it is chosen, what was cut."""
