"""Chains of cores as plain sequences of arrays: the algorithms below ``MPO``."""
