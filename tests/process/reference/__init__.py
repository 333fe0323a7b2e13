"""What transformers says the demo model answers: the yardstick of end-to-end tests, and what makes it."""
