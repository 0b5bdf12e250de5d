"""Records that travel between stages: a frozen model each, one home each, written as JSON."""
