"""Which files a model has, where they lie, and whether they are whole. No torch but in tensor_files."""
