"""From audio and records to what training and inference read: the frozen encoder is run once a clip."""
