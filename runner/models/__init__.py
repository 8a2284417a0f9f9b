"""Models that come with the runner; a user's own are named by ``_target_`` just the same."""
