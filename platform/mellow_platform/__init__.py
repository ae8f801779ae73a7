"""Train and serve Mellow, an audio language model, on one Ray cluster."""
