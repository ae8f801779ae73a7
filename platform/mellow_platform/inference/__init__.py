"""Answers to questions from a trained model, for prediction, evaluation and serving."""
