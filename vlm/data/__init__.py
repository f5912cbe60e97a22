"""Training data on its way from a published data set to what the loader reads."""
