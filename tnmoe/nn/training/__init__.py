"""Training of shared tensors and load biases: what happens around an optimiser's steps."""
