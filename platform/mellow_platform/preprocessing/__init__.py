"""Preprocessing of audio and records to shards for training and evaluation; the frozen encoder runs once per clip."""
