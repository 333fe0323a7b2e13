"""What transformers says the demo model answers: the yardstick of every end-to-end test, and the script that makes it."""
