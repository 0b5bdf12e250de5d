"""What the benchmarks share: timing in turns, tables, a load generator and the server it loads."""
