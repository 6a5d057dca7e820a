"""``lte report``."""
