"""rayclip: adversarial fine-tuning, attack and evaluation of CLIP, distributed over a cluster by Ray."""

__version__ = "0.1.0"

# Part of every evaluation cell's id. Raise it with any change that can alter a verdict, so that results from before and
# after the change are never mixed.
PROTOCOL = 3
