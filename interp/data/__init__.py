"""The bundled model, the generator of labelled text, word and relation lists."""
