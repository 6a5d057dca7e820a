"""Experts, their conversion, losses and accounting: torch and transformers only."""
