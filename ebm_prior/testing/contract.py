"""`check_backbone`: does an adapter keep the backbone contract? If not, which mistake does it make?

Every check is a generator that yields one sentence per mistake. All but the first run on the frozen network in float64,
where finite differences and densities leave no room for excuses; the caller's module is put back as it was. Densities
are never taken from the pass that is being checked: log p comes from log N(ε) − Σ log σ with the conditionals that
`top_down` showed us, log q from the posterior's noise map, log q(z_i | x, z_<i) = log N(ξ_i) − log|det ∂z_i/∂ξ_i|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior.backbone import Backbone, Draw, Gaussian
from ebm_prior.errors import ConfigurationError, ContractError
from ebm_prior.randomness import BlockGenerator, derived_generator
from ebm_prior.testing.isolation import WatchMatrixProducts, frozen, in_float64, random_state
from ebm_prior.testing.structure import declaration, draws, evaluation_mode, own_dtype, rebuilding

EXACT_JACOBIAN = 320
"""Up to this many latent dimensions (in one group, or in all) a Jacobian is formed whole, one backward pass a row."""


class ContractReport(NamedTuple):
    """What was checked, and what could not be: one sentence each."""

    checks: tuple[str, ...]
    skipped: tuple[str, ...]
