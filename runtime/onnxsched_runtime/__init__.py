"""The bundled runtime of onnxsched: loads annotated models and runs them."""
