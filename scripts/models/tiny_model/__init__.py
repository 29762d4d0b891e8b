"""Parts of `make_tiny_model.py`: corpus, tokenizer, network, training and export."""
