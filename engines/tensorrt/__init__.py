"""TensorRT and TensorRT-RTX: plans, their bindings and the session that runs them."""
