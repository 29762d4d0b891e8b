"""Krasis and its peers on the same work: measures, records in HDF5, and writes the documents from that."""
