"""First stages of milliseconds, and the losses that they meet."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toys import ToyConv

from ebm_prior.data.images import ImageSource
from ebm_prior.training import pretrain as stage
from ebm_prior.training.pretrain import pretrain
from ebm_prior.training.pretrain_config import PretrainConfig

SMALL: dict[str, Any] = {"iterations": 8, "batch_size": 16, "checkpoint_every": 2, "ema": 0.5, "kl_warmup": 0.5}


def losses(
    config: PretrainConfig, images: ImageSource, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[float, Any, Any]]:
    """The loss of every iteration, with log p(x|z) and the KL of which it is made."""
    terms: list[tuple[Any, Any]] = []
    found: list[float] = []
    true_terms, true_backward = stage._elbo_terms, torch.Tensor.backward

    def spy(*arguments: Any) -> Any:
        terms.append(true_terms(*arguments))
        return terms[-1]

    def backward(self: torch.Tensor) -> None:
        found.append(float(self.detach()))
        true_backward(self)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "_elbo_terms", spy)
        patch.setattr(torch.Tensor, "backward", backward)
        pretrain(ToyConv(), images, config)
    return [(loss, log_p.detach(), kl.detach()) for loss, (log_p, kl) in zip(found, terms, strict=True)]
