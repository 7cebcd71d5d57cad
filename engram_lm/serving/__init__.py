"""Models behind the OpenAI interface."""
