"""Routers, and what is known of their decisions."""
