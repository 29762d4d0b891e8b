"""What a conversation keeps: the cache of keys and values, in memory and in a file."""
