"""What is proven about a class of models and a group: one function a theorem, and what follows from all of them."""

from deltaproduct.theory.theorems.explanation import Explanation, explain
from deltaproduct.theory.theorems.model_class import ModelClass
from deltaproduct.theory.theorems.statements import Statement

__all__ = ["Explanation", "ModelClass", "Statement", "explain"]
