"""One method a file: its State, `scale_by_METHOD`, and the alias `METHOD`."""
