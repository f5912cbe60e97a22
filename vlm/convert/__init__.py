"""From Hugging Face folders to Megatron checkpoints: convert, combine, and compare with `transformers`."""
