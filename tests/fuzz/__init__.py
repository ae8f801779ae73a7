"""Requests that nobody should send, sent."""
