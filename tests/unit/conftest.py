"""What several of the unit tests use."""

from __future__ import annotations

import pytest
import torch

from dpo_scale.model import products


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product of fp32 by oneDNN, whatever the processor, a few columns or rows at a time."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "_onednn", lambda: products._pointwise)
    monkeypatch.setattr(products, "WORTH_IT", 1)
    monkeypatch.setattr(products, "SLICE", 200)
