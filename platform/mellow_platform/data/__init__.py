"""Question-answer records, audio decoding, shards, and built-in corpora; independent of models and jobs."""
