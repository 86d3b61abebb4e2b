"""Followers of a run: TensorBoard, wandb, MLflow."""
