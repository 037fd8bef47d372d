"""`longlora export`: a model as one GGUF file, which llama.cpp and Ollama run."""
