"""DALL-E (Ramesh et al. 2021), whole, as a PyTorch Lightning experiment repo."""
