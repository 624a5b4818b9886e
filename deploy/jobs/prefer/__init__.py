"""Answers that preferences are made of: how they are sampled, and their files."""
