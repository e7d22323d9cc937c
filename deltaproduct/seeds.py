"""Random streams that cannot meet: training data, evaluation data and initial weights each have seeds of their own.

PyTorch's CPU generator uses only the low 32 bits of a seed, so streams are told apart inside those: evaluation seeds
have the highest of them set, all others do not.
"""

import hashlib

import torch

_HALF = 2**31


def _hash(*parts: object) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _HALF


def training_generator(seed: int, batch: int) -> torch.Generator:
    """Training data of batch number `batch`: a pure function of both, with no repeat within 2³¹ batches of a run."""
    return torch.Generator().manual_seed((_hash("training", seed) + batch) % _HALF)


def evaluation_generator(seed: int, length: int) -> torch.Generator:
    """Evaluation data for one length; disjoint from every training stream, whatever its seed."""
    return torch.Generator().manual_seed(_HALF + _hash("evaluation", seed, length))


def order_generator(seed: int, epoch: int) -> torch.Generator:
    """The order in which an epoch visits a fixed training set."""
    return torch.Generator().manual_seed(_hash("order", seed, epoch))


def weights_seed(seed: int) -> int:
    """The seed of the initial weights."""
    return _hash("weights", seed)
