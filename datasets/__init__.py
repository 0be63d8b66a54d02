"""Records to samples to packs."""
