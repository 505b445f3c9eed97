"""What torch.compile of older PyTorch cannot trace into one graph."""

from __future__ import annotations

import pytest
import torch

_VERSION = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])

# PyTorch 2.11 traces neither an object's __dict__ nor a generator as a constant: such code runs there with breaks.
traces_objects = pytest.mark.skipif(
    _VERSION < (2, 13), reason="fm.sample and generators are one graph of torch.compile from PyTorch 2.13 on"
)
