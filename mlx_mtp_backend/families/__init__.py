"""One driver per head dialect."""
