"""Loader of models that earlier versions registered in MLflow, which name this module."""

from rayclip.tracking.serving import _load_pyfunc

__all__ = ["_load_pyfunc"]
