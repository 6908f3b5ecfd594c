"""The only package that knows Accelerate, DeepSpeed and ranks."""
