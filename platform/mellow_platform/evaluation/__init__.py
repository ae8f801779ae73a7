"""Answering a split on Ray Data, scores, and reports."""
