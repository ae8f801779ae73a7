"""Training on Ray Train: the audio encoder as a sound tagger, and Mellow on answers with DeepSpeed."""
