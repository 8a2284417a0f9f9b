"""Where scalars go: lines of JSON that follow the lineage exactly, and TensorBoard's event files."""
