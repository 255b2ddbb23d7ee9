"""Videos, latents, scenes and prompts to train on.

May import what training/ may; what one family of models needs belongs to recipes/.
"""
