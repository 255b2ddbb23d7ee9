"""Text to train on and what is held out."""
