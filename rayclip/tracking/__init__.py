"""Runs in MLflow: the journal beside the results, its delivery, and what MLflow shows; see README.md."""
