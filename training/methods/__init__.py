"""The semi-supervised methods: views, thresholds, refinement, propagation and losses."""
