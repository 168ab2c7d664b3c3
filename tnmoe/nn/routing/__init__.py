"""Routers, their losses, and records and statistics of their decisions."""
