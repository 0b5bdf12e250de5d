"""TensorRT engines: built, cached, run and checked."""
