"""Studies that make the figures of the docs."""
