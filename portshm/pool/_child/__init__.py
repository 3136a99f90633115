"""The worker's side. It knows nothing of the parent's."""
