"""The training loop and what it needs on any method: data, state, guards, ranks."""
