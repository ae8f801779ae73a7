"""Training on Ray Train: the encoder as a sound tagger, and Mellow on answers with DeepSpeed."""
