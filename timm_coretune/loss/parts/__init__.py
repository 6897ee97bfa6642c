"""What several losses are made of, so that the folder above holds one file per paper"""
