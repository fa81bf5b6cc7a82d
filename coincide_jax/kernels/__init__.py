"""Array mathematics; imports JAX and NumPy only."""
