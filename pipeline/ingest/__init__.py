"""From a delivery to checked, deduplicated and split images."""
