"""The synthetic demo data, rendered on this machine."""
