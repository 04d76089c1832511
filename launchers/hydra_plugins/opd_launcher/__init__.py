"""Hydra's part of the launching: the grid of a sweep, and who runs its jobs. Found by Hydra under this very name."""
