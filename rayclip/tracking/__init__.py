"""Logging to MLflow; the only package that imports `mlflow`."""

from rayclip.tracking.address import AwayError, check_address, default_uri
from rayclip.tracking.mlflow_tracker import MlflowTracker, look
from rayclip.tracking.spooled import SpooledTracker

__all__ = ["AwayError", "MlflowTracker", "SpooledTracker", "check_address", "default_uri", "look"]
