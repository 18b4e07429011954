"""Run evaluation, training and captioning on Ray; see README.md. Its names are imported from its modules.

Ray reads the variables that `connect.ray_cluster` sets when it is imported itself, and Ray Train and Tune are a third
of all imports, which evaluation actors do not need.
"""
