"""What happens around the steps of an optimiser."""
