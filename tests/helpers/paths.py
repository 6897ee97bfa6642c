"""Where things are in the repository"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
HELPERS = Path(__file__).parent
TESTS = HELPERS.parent
ASSETS = ROOT / 'timm_coretune' / 'assets'
SAMPLE = str(ASSETS / 'fashion_mnist_sample.safetensors')
