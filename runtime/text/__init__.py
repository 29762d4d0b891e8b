"""The text side: tokenizers, chat templates, text files, and the worker that runs them."""
