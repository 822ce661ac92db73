"""The contract kit: checks that an adapter, built-in or your own, keeps the backbone contract."""

from ebm_prior.testing.contract import ContractReport, check_backbone

__all__ = ["ContractReport", "check_backbone"]
