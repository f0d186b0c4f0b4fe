"""Algorithms that compare embeddings of query and support rows."""
