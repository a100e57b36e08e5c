"""One pass for the factors of all covered layers, and a layer's factors as arrays."""

from __future__ import annotations

import torch

from avalanche_gradproj.layers.select import cover
from avalanche_gradproj.methods.kfac_factors import FactorPass


def collect(model, batches, *, fisher="exact", seed=0, diagonal=True, **kwargs):
    coverage = cover(model)
    generator = torch.Generator().manual_seed(seed)
    names = coverage.frozen if diagonal else ()
    run = FactorPass(model, coverage.units, diagonal=names, fisher=fisher, generator=generator, **kwargs)
    return run.run(batches)


def pair(sums, name):
    """A and B of a layer, as arrays [blocks, ., .]."""
    right, left = sums.layers[name].factors(sums.samples)
    return right.numpy(), left.numpy()
