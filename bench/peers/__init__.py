"""Baton beside the servers that a user might run instead: same weights, same cores, same load, taking turns."""
