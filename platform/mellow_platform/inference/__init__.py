"""Answering questions with a trained model: what evaluation and serving share."""
