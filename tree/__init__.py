"""The draft tree: build, walk. NumPy only."""
