"""Models of others: Hugging Face folders and GGUF files become checkpoints of ours, and ours become such folders."""
