"""Followers of a run: TensorBoard, wandb, MLflow, SwanLab, Trackio."""
