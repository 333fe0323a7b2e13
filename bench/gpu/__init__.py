"""What a GPU is used for: steps beside their floors, and what a handoff on one GPU adds to a request."""
