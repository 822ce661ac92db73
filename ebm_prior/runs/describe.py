"""Descriptions of prior files and backbones, as plain values: sizes, parameter counts, records."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebm_prior.errors import UnknownBackboneError
from ebm_prior.model.backbone import Backbone
from ebm_prior.model.energy import EnergyConfig, JointEnergy
from ebm_prior.storage.checkpoint import PRIOR_KEY, backbone_record, bundled, bundled_priors, prior_file, prior_record
from ebm_prior.storage.registry import adapter, registered
from ebm_prior.storage.roles import PREFIX
from ebm_prior.storage.weights import count_parameters, fingerprint, read_tensors
from ebm_prior.training.fit_config import FitConfig, paper_preset


def parameters(backbone: Backbone, energy: EnergyConfig, own: nn.Module | None = None) -> dict[str, float]:
    """Parameter counts of a backbone and of heads with this configuration on it, and their ratio (Table 9).

    own: the user's own energy in place of the heads, or None.
    """
    with torch.device("meta"):  # counted, not made
        heads = count_parameters(JointEnergy(backbone.groups, energy) if own is None else own)
    count = count_parameters(backbone)
    return {"backbone": count, "heads": heads, "ratio": heads / count}


def head_parameters(path: Path) -> dict[str, int]:
    """Parameters per head of a prior file, and those of its refiner together (not the standardisation constants)."""
    tensors = read_tensors(prior_file(path), PRIOR_KEY, "an ebm-prior file")[0]
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(PREFIX)
        head = own.split(".")[1] if own.startswith("heads.") else own.split(".")[0]  # joint, or a module of one's own
        head = head if own == name else "refiner"  # all heads of a refiner together
        if not own.endswith((".shift", ".scale")) and own not in ("factor", "offset"):
            counts[head] = counts.get(head, 0) + tensor.numel()
    return counts


def describe_backbone(backbone: Backbone, record: Mapping[str, Any]) -> dict[str, Any]:
    """A backbone's groups and parameter counts, with those of the default heads and of the paper's (Table 9).

    `record`: the record in its checkpoint (see `own_record`).
    """
    return {
        "class": type(backbone).__name__,
        "image_shape": list(backbone.image_shape),
        "groups": [[group.name, list(group.shape)] for group in backbone.groups],
        "fingerprint": fingerprint(backbone),
        "parameters": parameters(backbone, FitConfig().energy),
        "parameters_paper": parameters(backbone, paper_preset().energy),
        "architecture": dict(backbone.architecture),
        "record": dict(record),
    }


def list_backbones() -> dict[str, Any]:
    """Installed adapters (with the error of one that cannot be imported), bundled backbones and bundled priors."""
    adapters = []
    for name, point in registered().items():
        row = {"adapter": name, "class": point.value}
        try:
            adapters.append(row | {"reads": adapter(name).official_format})
        except UnknownBackboneError as error:
            adapters.append(row | {"error": str(error)})
    trained = []
    for name, path in bundled().items():
        card = backbone_record(path)
        trained.append({"name": name, "adapter": card["adapter"], "data": card["record"].get("data", {}).get("name")})
    priors = []
    for name, path in bundled_priors().items():
        record = prior_record(path)
        gain = record["record"]["held_out"]["tempered"]["nats"]
        priors.append({"name": name, "backbone": record["backbone"]["checkpoint"], "gain": gain})
    return {"adapters": adapters, "bundled": trained, "priors": priors}
