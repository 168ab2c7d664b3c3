"""Experiments on the claim that experts with a shared core match ordinary mixtures.

``python -m experiments`` runs them; README.md in this folder describes them.
"""
