"""The algorithms, usable in a plain PyTorch loop: nothing here knows Avalanche."""
