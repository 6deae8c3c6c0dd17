"""What requests and answers look like: JSON rows, Open Inference Protocol tensors, explanations, OpenAPI."""
