"""What all processes of a Baton cluster agree on. Never imports torch."""
