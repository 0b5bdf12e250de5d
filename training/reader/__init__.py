"""How a training comes to its images: which ones each step takes, and their pixels as tensors."""
