"""Costs of a model: FLOPs, memory, its skeleton without weights."""
