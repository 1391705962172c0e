"""The same step on several ranks."""
