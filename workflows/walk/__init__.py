"""What `walk_model.py` is made of: a whole model, one decoder block at a time."""
