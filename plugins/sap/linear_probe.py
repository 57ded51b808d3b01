"""Linear probe: what a linear classifier reads off frozen features."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Probe:
    """Accuracy on unseen rows, and of always saying their most frequent label."""

    accuracy: float
    majority: float


def linear_probe(
    train: Float[Tensor, "n d"],
    train_labels: Int[Tensor, "n"],
    test: Float[Tensor, "m d"],
    test_labels: Int[Tensor, "m"],
    ridge: float = 1e-3,
    iterations: int = 200,
) -> Probe:
    """Multinomial logistic regression on standardised features, fitted to the optimum: no seed, no learning rate.

    Args:
        train, train_labels: rows to fit on.
        test, test_labels: rows to score on.
        ridge: weight of the squared coefficients against the mean log loss.
        iterations: most steps of L-BFGS.

    Raises:
        ValueError: if a side is empty, or a test label never occurs in training.
    """
    if not len(train) or not len(test):
        raise ValueError(f"a probe needs rows on both sides, got {len(train)} and {len(test)}")
    x, y = train.double().cpu().numpy(), train_labels.cpu().numpy()
    z, w = test.double().cpu().numpy(), test_labels.cpu().numpy()
    names = np.unique(y)
    if not np.isin(w, names).all():
        raise ValueError(f"test rows have labels {sorted(set(w.tolist()) - set(names.tolist()))} that training rows never have")
    mean, std = x.mean(0), x.std(0)
    std[std < 1e-9] = 1.0
    x, z = (x - mean) / std, (z - mean) / std
    targets = (y[:, None] == names).astype(np.float64)
    k, d = len(names), x.shape[1]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, bias = flat[: k * d].reshape(d, k), flat[k * d :]
        log_share = log_softmax(x @ weights + bias, axis=1)
        error = (np.exp(log_share) - targets) / len(x)
        loss = -(targets * log_share).sum() / len(x) + 0.5 * ridge * (weights**2).sum()
        return loss, np.concatenate([(x.T @ error + ridge * weights).ravel(), error.sum(0)])

    found = minimize(objective, np.zeros(k * d + k), jac=True, method="L-BFGS-B", options={"maxiter": iterations}).x
    guess = names[(z @ found[: k * d].reshape(d, k) + found[k * d :]).argmax(1)]
    _, counts = np.unique(w, return_counts=True)
    return Probe(float((guess == w).mean()), float(counts.max() / len(w)))
