from .weights import average_weights as average_weights
