"""ONNX graphs of the networks, for runtimes other than ours."""
