"""What scripts/torture.py does to runs, and how it looks at what came of them."""
