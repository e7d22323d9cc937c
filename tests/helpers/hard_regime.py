"""Inputs where chunked algorithms break: few or almost parallel keys, and no decay."""

import numpy as np
from oracle import Answer

T, H = 4096, 2

KEYS = ("2 directions", "12 directions", "cosine .99")  # one a batch row, so that one loop serves all three


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def keys(rng: np.random.Generator, kind: str, n: int, key_dim: int) -> np.ndarray:
    if kind == "cosine .99":
        # Around a common direction c, √.99·c + √.01·(unit noise): the cosine of two is .99 but for the noises' own.
        noise = unit(rng.standard_normal((T, n, H, key_dim)))
        return unit(np.sqrt(0.99) * unit(rng.standard_normal(key_dim)) + np.sqrt(0.01) * noise)
    directions = unit(rng.standard_normal((int(kind.split()[0]), key_dim)))
    return directions[rng.integers(len(directions), size=(T, n, H))]


def errors(got: Answer, want: Answer) -> dict[str, list[float]]:
    """For each result and gradient, the error of each row of KEYS, relative to that row's largest entry."""
    pairs = {"o": (got.o, want.o), "final": (got.final, want.final)}
    pairs |= {f"d_{name}": (a, want.grads[name]) for name, a in got.grads.items()}
    return {name: [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(*pair)] for name, pair in pairs.items()}
