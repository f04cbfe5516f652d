"""Training data -> which data sets and which samples will change the persona (Chen et al. 2025, section 6)."""
