"""Bundles: manifest, shards and text files, and how they are written, read and checked."""
