"""What a model costs: FLOPs, memory, its skeleton without weights."""
