"""MLflow: the only room where `mlflow` is imported."""

from rayclip.tracking.mlflow_tracker import MlflowTracker, default_uri, look
from rayclip.tracking.spooled import SpooledTracker

__all__ = ["MlflowTracker", "SpooledTracker", "default_uri", "look"]
