"""Generation of images from prompts with trained models."""
