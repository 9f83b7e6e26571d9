"""Between this project and the others: Hugging Face folders out and in, tokenizers, evaluation with lm-eval."""
