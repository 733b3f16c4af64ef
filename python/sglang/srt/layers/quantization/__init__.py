"""Weights that stay quantised in memory."""
