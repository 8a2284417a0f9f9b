"""Tasks that come with the runner; a user's own are named by ``_target_`` in the same way."""
