"""From rows of activations to rows of outputs: routes, kernels, kept matrices."""
