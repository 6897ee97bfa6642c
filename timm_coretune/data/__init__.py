"""Data for any training loop: resumable loaders, class-balanced batches, images in safetensors files"""
