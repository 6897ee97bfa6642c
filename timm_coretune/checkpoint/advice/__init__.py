"""What to do with a checkpoint that does not fit a model: which timm model it fits, and with which arguments"""
