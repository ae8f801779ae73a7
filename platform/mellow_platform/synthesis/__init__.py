"""ReasonAQA questions from captions: asking a language model or rules, checking what they write, mixing a corpus."""
