"""How BentoML starts, watches and packs the service."""
