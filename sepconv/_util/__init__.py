"""Small helpers that know nothing of convolutions."""
