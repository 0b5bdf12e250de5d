"""The server under load: latency, overload, swaps, memory, a soak."""
