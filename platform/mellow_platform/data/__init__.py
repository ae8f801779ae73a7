"""Question-answer records, audio decoding, shards, and the built-in corpus; knows nothing of the model."""
