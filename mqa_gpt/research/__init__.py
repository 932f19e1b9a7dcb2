"""Look inside: record and change what a model computes, and analyses built on the two."""

from mqa_gpt.research.patch import Edit, add, edit, mean, patch, replace, zero
from mqa_gpt.research.record import Activations, record

__all__ = ["Activations", "Edit", "add", "edit", "mean", "patch", "record", "replace", "zero"]
