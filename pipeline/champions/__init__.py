"""Which model serves: the gate, its statistics, the champions and their history."""
