"""Experts that are added, removed, merged and reordered, also under a live optimiser."""
