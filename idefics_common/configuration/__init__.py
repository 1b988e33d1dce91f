"""The configuration: its fields with their defaults and checks, and the classes that transformers knows."""
