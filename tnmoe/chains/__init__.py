"""Chains of cores as plain sequences of arrays: the engine rooms below ``MPO``."""
