"""Which measurement to make next. Pure: it knows a posterior and candidates, and measures nothing."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from profiler.lattice import Array, Lattice
from profiler.law import Points, Posterior


def best_probe(lattice: Lattice, posterior: Posterior, candidates: Array, measured: Array) -> int:
    """Index of the candidate (n, 3) whose measurement lowers the total variance over the lattice most (A-optimal); measured ones come last."""
    dense = Points.at(lattice, candidates).lattice()
    weights = csr_array(dense)
    shared = np.asarray(weights @ posterior.covariance)
    gain = np.sum(shared**2, axis=1) / (np.sum(shared * dense, axis=1) + weights @ posterior.noise)
    known = (candidates[:, None, :] == measured[None, :, :]).all(axis=2).any(axis=1)
    return int(np.argmax(np.where(known, gain - gain.max() - 1.0, gain)))
