"""Answering requests: retrieval, ranking and reranking under hard rules and a deadline, in plain Python."""
