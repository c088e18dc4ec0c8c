"""The slab under the house: files, keys, progress, and what it means to run one stage. Standard library and pydantic only."""
