"""Quantised checkpoints: integers or eight-bit floats, and scales. Read as a matrix of codes, or as plain weights."""
