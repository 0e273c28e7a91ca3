"""Tokenizers and chat templates of models in Hugging Face's layout; checkpoint/hugging_face.py reads their weights."""
