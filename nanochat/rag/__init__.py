"""Retrieval-augmented generation: documents into prompts, citations and support out of answers."""
