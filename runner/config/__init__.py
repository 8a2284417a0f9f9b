"""The schema of the configuration, and which half of it determines what is computed."""
