"""Images for any loop: order and augmentation that follow from a seed, balanced batches, images in safetensors files"""
