"""The blocks of docs/loops.md run one after the other, and its commands are those of the examples"""

import re

import pytest
import torch
from paths import ROOT

PAGE = (ROOT / 'docs' / 'loops.md').read_text()
BLOCKS = re.findall(r'```python\n(.*?)```', PAGE, re.DOTALL)
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', PAGE, re.DOTALL) for line in block.splitlines()]


def test_every_example_of_a_loop_is_named_and_its_command_given():
    examples = {f'examples/{path.name}' for path in (ROOT / 'examples').glob('*.py')}
    named = set(re.findall(r'examples/\w+\.py', PAGE))
    assert examples - named == {'examples/tune_and_export.py'}
    own = {f'python {name}' for name in named} - {'python examples/plain_loop.py', 'python examples/timm_loop.py'}
    assert set(COMMANDS) == own


@pytest.mark.slow
def test_the_blocks_run(monkeypatch, tmp_path):
    for library in ('transformers', 'lightning', 'sentence_transformers'):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCKS:
        exec(block, names)
    assert names['loss'].isfinite()
    assert names['module'].model is names['model']
    weights = names['classifier'].state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in names['plain'].state_dict().items())
    train_embeddings(names['CoreTuningEmbeddingLoss'], tmp_path)


def train_embeddings(create_loss, folder):
    """The trainer of sentence-transformers trains the embeddings, the classifier and the projection head."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ['red', 'green', 'blue', 'ball', 'cube', '[UNK]']
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=6)], device='cpu')
    loss = create_loss(model, 3)
    before = {name: p.detach().clone() for name, p in loss.named_parameters()}
    texts = [f'{color} {thing}' for color in words[:3] for thing in words[3:5]]
    arguments = SentenceTransformerTrainingArguments(
        str(folder / 'texts'), max_steps=2, report_to='none', save_strategy='no', use_cpu=True, disable_tqdm=True
    )
    rows = Dataset.from_dict({'text': texts, 'label': [0, 0, 1, 1, 2, 2]})
    SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss).train()
    moved = {name.split('.')[0] for name, p in loss.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {'model', 'classifier', 'criterion'}
