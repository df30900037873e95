"""Training of the embedded reference model; see train_reference.py."""
