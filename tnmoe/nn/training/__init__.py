"""Training of shared cores and load biases: what happens around an optimiser's steps."""
