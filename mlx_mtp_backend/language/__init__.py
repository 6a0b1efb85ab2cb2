"""Between text and tokens: tokenizer and chat template, grammars of response formats."""
