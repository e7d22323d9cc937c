"""Groups and classes of models that theorems are asked about."""

import itertools

from deltaproduct.theory.theorems.model_class import ModelClass

SINGLE = ["S2", "S3", "S4", "S5", "A3", "A4", "A5", "Z2", "Z3", "Z4", "Z6", "Z8", "Z60", "D3", "D4", "D5", "D8", "D12"]

PRODUCTS = ["Z2_x_Z2", "Z2_x_Z3", "Z2_x_Z4", "Z4_x_Z4", "D4_x_Z2", "S3_x_Z2", "S3_x_D4", "A4_x_Z2", "A5_x_Z2"]

SMALL = SINGLE + PRODUCTS  # at most 120 elements

LARGE = ["S6", "A6", "D32", "S3_x_S4", "Z60_x_Z2"]

RESTRICTED = [("S3", 2), ("S4", 2), ("S4", 3), ("S5", 2), ("S5", 3), ("S5", 4)]

TASKS = [(name, None) for name in SMALL + LARGE] + RESTRICTED

DIAGONAL = {"transition": "diagonal"}

COUNTING, COUNTING_PROOF = "P2, Theorem 2", "P2, proof of Theorem 2"


def classes(most_householder=6, most_layers=5):
    for n, layers, neg, gated in itertools.product(
        range(1, most_householder + 1), range(1, most_layers + 1), (True, False), (True, False)
    ):
        yield ModelClass(n, layers, neg, gated)
    for layers, neg in itertools.product(range(1, most_layers + 1), (True, False)):
        yield ModelClass(layers=layers, allow_neg_eigval=neg, transition="diagonal")
