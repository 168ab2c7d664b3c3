"""The way from rows of activations to rows of outputs: routes, kernels and the weight cache."""
