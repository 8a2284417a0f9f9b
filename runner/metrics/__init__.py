"""Writers of metrics: lines of JSON, each step once, and TensorBoard's event files."""
