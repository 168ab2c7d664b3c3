"""Contraction: orders, costs and routes from vectors to results."""
