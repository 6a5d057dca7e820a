"""Write a saved model in the formats that other programs read."""
