"""The schema of a configuration, and which half of it says what is computed."""
