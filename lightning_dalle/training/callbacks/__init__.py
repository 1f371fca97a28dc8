"""Callbacks for checkpoints, visualization, evaluation and encoding."""
