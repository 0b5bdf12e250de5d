"""What the tests of training share: a small network, samples in memory, runs in processes of their own."""
