"""Truncation: what it may cut, how bonds are chosen, what it reports."""
