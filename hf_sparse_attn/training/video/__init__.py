"""Videos, latents and prompts to train on."""
