"""Contractions of chains: their order, their cost, and carrying them out."""
