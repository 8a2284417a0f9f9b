"""A user's own package, beside which tests start the runner."""
