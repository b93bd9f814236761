"""The parts of `walk_model.py`: a whole model, one decoder block at a time."""
