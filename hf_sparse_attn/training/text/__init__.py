"""Text to train on, and what is held out of it.

May import what training/ may; losses belong to training/.
"""
