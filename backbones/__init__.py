"""Networks and adapters of the published hierarchical VAEs."""
