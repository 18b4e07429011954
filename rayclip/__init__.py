"""rayclip: adversarial fine-tuning and attack of CLIP, carried over a cluster by Ray."""

__version__ = "0.1.0"

# Part of every evaluation cell's identity. Raise it with any change that can move a verdict, so that
# results computed before the change are never mixed with results computed after it.
PROTOCOL = 3
