"""The HTTP API: OpenAI's endpoints, and what operators ask."""
