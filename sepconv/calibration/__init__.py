"""Factors from what a model computes on example batches."""
