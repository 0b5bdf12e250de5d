"""A bundle's answers: which runtime, precision and device, and its sessions."""
