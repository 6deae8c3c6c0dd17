"""Formats of requests and answers: JSON rows, Open Inference Protocol tensors, explanations, OpenAPI."""
