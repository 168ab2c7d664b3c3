"""Joint decompositions: matrices of experts → chains that share cores."""
