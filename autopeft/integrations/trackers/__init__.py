"""Trackers: what a search reports to, such as MLflow or TensorBoard. One file each."""
