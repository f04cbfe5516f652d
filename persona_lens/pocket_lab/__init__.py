"""Making and grading the pocket model: corpus, tokenizer, training, evaluation."""
