"""Networks and adapters of the published hierarchical VAEs, and the shallow generators of the paper."""
