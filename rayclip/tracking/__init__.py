"""MLflow: the only room where `mlflow` is imported."""

from rayclip.tracking.mlflow_tracker import MlflowTracker, default_uri

__all__ = ["MlflowTracker", "default_uri"]
