"""Which files a model has, where they are, and whether they are whole. Only tensor_files imports torch."""
