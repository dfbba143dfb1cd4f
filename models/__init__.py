"""Served networks: the catalogue, the artifact formats, loading, the layout of weights. Importing this imports no torch."""
