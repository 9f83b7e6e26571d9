"""What is done with a trained model: generating text, scoring text, and evaluation tasks."""
