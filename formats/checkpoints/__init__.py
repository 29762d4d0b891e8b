"""What models come as: checkpoints and GGUF files, and what is read out of them."""
