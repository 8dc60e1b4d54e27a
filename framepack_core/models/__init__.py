"""Files of models and LoRAs: where they are, and whether they are complete and fit.

Only tensor_files imports torch.
"""
