"""Exchange with other projects: Hugging Face folders out and in, tokenizers, checks of exports."""
