"""Many fits of one comparison: what they are, who runs them, what became of each."""
