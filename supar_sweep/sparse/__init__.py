"""Sparsity: counter-based noise, layer densities, exact-count masks, layers that carry them."""
