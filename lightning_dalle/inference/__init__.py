"""From captions to pictures with trained models."""
