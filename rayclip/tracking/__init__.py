"""MLflow: the only room where `mlflow` is imported."""

from rayclip.tracking.address import AwayError, check_address, default_uri
from rayclip.tracking.mlflow_tracker import MlflowTracker, look
from rayclip.tracking.spooled import SpooledTracker

__all__ = ["AwayError", "MlflowTracker", "SpooledTracker", "check_address", "default_uri", "look"]
