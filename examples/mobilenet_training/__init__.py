"""The parts of `train_mobilenet.py`: data, optimisation, processes, state, curves, and the loop."""
