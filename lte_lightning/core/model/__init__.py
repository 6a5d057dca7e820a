"""The model: its FFNs as experts, how they are stored, saved and loaded."""
