"""A model at several budgets, to choose one from."""
